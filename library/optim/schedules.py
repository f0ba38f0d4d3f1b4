"""Learning-rate schedules: the factor on each group's rate as a function of the number of optimizer updates done so far.

All lengths count optimizer updates, whatever the number of processes and of accumulated batches.

Symbols: N updates of the run, W of the warm-up, D of the decay, k done so far (0 at the first update).
"""

import importlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.options.checks_optimizer import (
    did_you_mean_class,
    is_adafactor,
    is_schedule_free,
    optimizer_name,
    read_arguments,
    schedule_problems,
    sets_its_own_rate,
    step_rules,
)
from library.options.effects import without_effect
from library.options.errors import UsageError
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.scheduler import SchedulerOptions
from library.options.optimizer_choices import POLYNOMIAL_LR_END

logger = logging.getLogger(__name__)

Multiplier = Callable[[int], float]
"""From k to the factor on the rate."""


@dataclass(frozen=True)
class Course:
    """What the factor of a schedule depends on."""

    total: int
    """N."""
    warmup: int
    """W."""
    decay: int
    """D."""
    rate: float
    """`--learning_rate`, which rates given as numbers are relative to, also in groups that have a rate of their own."""
    options: SchedulerOptions
    arguments: Mapping[str, Any]

    def progress(self, k: int) -> float:
        """How much of the way from the warm-up to the end is done, 0 to 1 and beyond."""
        return (k - self.warmup) / max(1, self.total - self.warmup)


def after_warmup(course: Course, then: Multiplier) -> Multiplier:
    """Rise linearly from 0, k/W, and go on with `then`."""
    return lambda k: k / course.warmup if k < course.warmup else then(k)


def half_wave(angle: float) -> float:
    """½(1 + cos(π·angle)): 1 at angle 0, 0 at 1, 1 again at 2."""
    return 0.5 * (1 + math.cos(math.pi * angle))


def constant(course: Course) -> Multiplier:
    """1."""
    return lambda k: 1.0


def constant_with_warmup(course: Course) -> Multiplier:
    """Warm-up, then 1."""
    return after_warmup(course, lambda k: 1.0)


def linear(course: Course) -> Multiplier:
    """Warm-up, then down to 0 at N in a straight line."""
    return after_warmup(course, lambda k: max(0.0, 1 - course.progress(k)))


def cosine(course: Course) -> Multiplier:
    """Warm-up, then ½(1 + cos πp); `num_cycles` of the arguments counts whole waves, and past N the factor rises again."""
    waves = course.arguments.get("num_cycles", 0.5)
    return after_warmup(course, lambda k: max(0.0, half_wave(2 * waves * course.progress(k))))


def cosine_with_restarts(course: Course) -> Multiplier:
    """Warm-up, then `--lr_scheduler_num_cycles` times from 1 to 0, and 0 past N."""
    cycles = course.options.lr_scheduler_num_cycles
    return after_warmup(
        course, lambda k: 0.0 if course.progress(k) >= 1 else max(0.0, half_wave((cycles * course.progress(k)) % 1.0))
    )


def polynomial(course: Course) -> Multiplier:
    """Warm-up, then ((rate − end)·(1 − p)^power + end)/rate, and end/rate past N."""
    end = course.arguments.get("lr_end", POLYNOMIAL_LR_END)
    power = course.options.lr_scheduler_power

    def decayed(k: int) -> float:
        remaining = max(0.0, 1 - course.progress(k))
        return float(((course.rate - end) * remaining**power + end) / course.rate)

    return after_warmup(course, decayed)


def inverse_sqrt(course: Course) -> Multiplier:
    """Warm-up, then √(s/(k − W + s)) with the time scale s, or W, or 10000."""
    scale = course.options.lr_scheduler_timescale or course.warmup or 10_000
    return after_warmup(course, lambda k: math.sqrt(scale / (k - course.warmup + scale)))


def cosine_with_min_lr(course: Course) -> Multiplier:
    """Warm-up from 0, then m + (1 − m)·½(1 + cos(πcp)), c = `--lr_scheduler_num_cycles`."""
    ratio = course.options.lr_scheduler_min_lr_ratio
    lowest = course.arguments["min_lr"] / course.rate if ratio is None else ratio
    cycles = course.options.lr_scheduler_num_cycles
    return after_warmup(course, lambda k: max(0.0, lowest + (1 - lowest) * half_wave(cycles * course.progress(k))))


def warmup_stable_decay(course: Course) -> Multiplier:
    """Up from m to 1, 1 for N − W − D updates, down to m over D, and m past N; m = `--lr_scheduler_min_lr_ratio` or 0."""
    lowest = course.options.lr_scheduler_min_lr_ratio or 0.0
    cycles = course.options.lr_scheduler_num_cycles
    rises: dict[str, Callable[[float], float]] = {
        "linear": lambda q: q,
        "cosine": lambda q: 1 - half_wave(q),
        "1-sqrt": lambda q: 1 - math.sqrt(1 - q),
    }
    falls: dict[str, Callable[[float], float]] = {
        "linear": lambda q: 1 - q,
        "cosine": lambda q: half_wave(cycles * q),
        "1-sqrt": lambda q: 1 - math.sqrt(q),
    }
    rise, fall = rises[course.arguments.get("warmup_type", "linear")], falls[course.arguments.get("decay_type", "cosine")]
    decay_start = course.total - course.decay

    def factor(k: int) -> float:
        if k < course.warmup:
            share = rise(k / course.warmup)
        elif k < decay_start:
            share = 1.0
        elif k < course.total:
            share = fall((k - decay_start) / course.decay)
        else:
            share = 0.0
        return max(0.0, lowest + (1 - lowest) * share)

    return factor


def piecewise_constant(course: Course) -> Multiplier:
    """The factors of `step_rules`, each up to its update, the last one from then on."""
    rules = step_rules(course.arguments["step_rules"])
    if rules is None:
        raise UsageError([f"step_rules of --lr_scheduler_args cannot be read: {course.arguments['step_rules']!r}."])
    steps, last = rules
    return lambda k: next((factor for until, factor in steps if k < until), last)


SCHEDULES: Mapping[str, Callable[[Course], Multiplier]] = {
    build.__name__: build
    for build in (
        constant,
        constant_with_warmup,
        linear,
        cosine,
        cosine_with_restarts,
        polynomial,
        inverse_sqrt,
        cosine_with_min_lr,
        warmup_stable_decay,
        piecewise_constant,
    )
}


class RelativeStepSchedule(LRScheduler):
    """Reports the rate Adafactor chose for the first tensor of each group, and the group's `initial_lr` before the first update."""

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return one rate per group."""
        rates: list[float | torch.Tensor] = []
        for group in self.optimizer.param_groups:
            states = (self.optimizer.state[p] for p in group["params"] if self.optimizer.state.get(p))
            state = next(states, None)
            rate = group["initial_lr"] if state is None else self.optimizer._get_lr(group, state)  # type: ignore[attr-defined]
            rates.append(float(rate))
        return rates


def length_in_updates(length: int | float, total: int) -> int:
    """Return a whole number of updates: a float is a share of the run, rounded down, so 0.1 of 100 is 10."""
    return math.floor(length * total) if isinstance(length, float) else length


def make_schedule(
    options: SchedulerOptions, optimizer_options: OptimizerOptions, optimizer: torch.optim.Optimizer, num_updates: int
) -> LRScheduler:
    """Make the schedule that was asked for; step it once after each optimizer update that was not skipped.

    Schedule-free optimizers and Adafactor with relative steps set their rate themselves: theirs only reports it.

    Args:
        options: which schedule and its lengths.
        optimizer_options: what `optimizer` was made from.
        optimizer: as `make_optimizer` gives it.
        num_updates: optimizer updates of the whole run, the same on every process.

    Raises:
        UsageError: for unknown names and arguments and missing packages.
    """
    if problems := schedule_problems(options, optimizer_options):
        raise UsageError(problems)
    _log_advice(options, optimizer_options, num_updates)
    return build_schedule(options, optimizer_options, optimizer, num_updates)


def build_schedule(
    options: SchedulerOptions, optimizer_options: OptimizerOptions, optimizer: torch.optim.Optimizer, num_updates: int
) -> LRScheduler:
    """As `make_schedule`, for options that were checked, and silent."""
    if sets_its_own_rate(optimizer_options):
        return RelativeStepSchedule(optimizer)
    if is_schedule_free(optimizer_options):
        return LambdaLR(optimizer, lambda k: 1.0)
    arguments, _ = read_arguments(options.lr_scheduler_args, "--lr_scheduler_args")
    if options.lr_scheduler_type:
        return _schedule_of_class(options.lr_scheduler_type, optimizer, arguments)
    warmup, decay = length_in_updates(options.lr_warmup_steps, num_updates), length_in_updates(options.lr_decay_steps, num_updates)
    course = Course(num_updates, warmup, decay, optimizer_options.learning_rate, options, arguments)
    return LambdaLR(optimizer, SCHEDULES[options.lr_scheduler](course))


def _log_advice(options: SchedulerOptions, optimizer_options: OptimizerOptions, num_updates: int) -> None:
    if sets_its_own_rate(optimizer_options):
        _warn_unused(options, "Adafactor with relative steps")
        return
    if is_schedule_free(optimizer_options):
        _warn_unused(options, optimizer_name(optimizer_options))
        return
    warmup = length_in_updates(options.lr_warmup_steps, num_updates)
    if warmup >= num_updates:
        logger.warning("The warm-up of %d updates does not end within the run of %d updates.", warmup, num_updates)
    if is_adafactor(optimizer_options) and (options.lr_scheduler_type or options.lr_scheduler != "constant_with_warmup"):
        logger.warning("Adafactor with a fixed rate is best begun with a warm-up: --lr_scheduler constant_with_warmup.")


def _warn_unused(options: SchedulerOptions, who: str) -> None:
    unset = SchedulerOptions()
    given = [
        f"--{name}"
        for name in ("lr_scheduler", "lr_scheduler_type", "lr_warmup_steps")
        if getattr(options, name) != getattr(unset, name)
    ]
    if given and not options.lr_scheduler.startswith("adafactor"):
        logger.warning("%s sets its own rate; %s.", who, without_effect(given))


def _schedule_of_class(path: str, optimizer: torch.optim.Optimizer, arguments: Mapping[str, Any]) -> LRScheduler:
    module_name, _, class_name = path.rpartition(".")
    module = importlib.import_module(module_name or "torch.optim.lr_scheduler")
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type) or not issubclass(cls, LRScheduler) or cls is torch.optim.lr_scheduler.ReduceLROnPlateau:
        known = [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, LRScheduler)]
        hint = did_you_mean_class(class_name, known)
        raise UsageError([f"--lr_scheduler_type: {module.__name__} has no schedule {class_name} that follows the updates.{hint}"])
    try:
        return cls(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise UsageError([f"--lr_scheduler_type {path} does not accept --lr_scheduler_args {dict(arguments)}: {error}."]) from error
