"""What a schedule does to the rate of each group over a run, found before the run by letting the schedule alone run through."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.optim.schedules import build_schedule
from library.options.checks_optimizer import sets_its_own_rate
from library.options.errors import UsageError
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.scheduler import SchedulerOptions


@dataclass(frozen=True)
class RateCourse:
    """The rate of one group over a run."""

    first: float
    """Of the first update that is made."""
    highest: float
    """Of all updates from then on."""
    last: float
    """Of the last update."""


class _Still(torch.optim.Optimizer):
    """Has the groups of an optimizer and steps nothing."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


def rate_courses(
    scheduler: SchedulerOptions,
    options: OptimizerOptions,
    groups: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    first_update: int,
    num_updates: int,
) -> list[RateCourse] | None:
    """Return the course of each group's rate, or None for Adafactor with relative steps, whose rates depend on the weights.

    Args:
        scheduler: the schedule.
        options: the optimizer.
        groups: as they are given to the optimizer.
        defaults: the optimizer's own, of which some schedules change others than the rate.
        first_update: updates made before, in a run that is resumed.
        num_updates: of the whole run.

    Raises:
        UsageError: the schedule ends before the run does, or gives groups that have different rates the same one.
    """
    if sets_its_own_rate(options):
        return None
    rates = [float(group.get("lr", options.learning_rate)) for group in groups]
    still = _Still([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], dict(defaults))
    schedule = build_schedule(scheduler, options, still, num_updates)
    first_update = min(first_update, max(num_updates - 1, 0))
    course = zip(*_rates(schedule, still, first_update, max(num_updates, 1)), strict=True)
    courses = [RateCourse(first, highest, last) for first, highest, last in course]
    _check_differences(rates, courses, scheduler.lr_scheduler_type or scheduler.lr_scheduler)
    return courses


def _rates(schedule: LRScheduler, still: _Still, first: int, total: int) -> Iterator[list[float]]:
    """Yield the rates of all groups at the first update, the highest ones, and those at the last update."""
    if type(schedule) is LambdaLR:  # one factor for every group, which can be asked for at any update
        factor = schedule.lr_lambdas[0]
        for value in (factor(first), max(map(factor, range(first, total))), factor(total - 1)):
            yield [float(base) * value for base in schedule.base_lrs]
        return
    still.step()
    highest = [0.0] * len(still.param_groups)
    for update in range(total):
        rates = [float(group["lr"]) for group in still.param_groups]
        highest = [max(pair) for pair in zip(highest, rates, strict=True)] if update > first else rates
        if update == first:
            yield rates
        if update < total - 1:
            _step(schedule, update + 1, total)
    yield highest
    yield rates


def _step(schedule: LRScheduler, done: int, total: int) -> None:
    try:
        schedule.step()
    except ValueError as error:
        name = type(schedule).__name__
        raise UsageError(
            [f"--lr_scheduler_type {name} ends after {done} of {total} updates: {error}. Change --lr_scheduler_args."]
        ) from error


def _check_differences(rates: Sequence[float], courses: Sequence[RateCourse], name: str) -> None:
    """Raise UsageError where the schedule gives groups of different rates the same rates."""
    if len(set(rates)) > 1 and len(set(courses)) == 1 and courses[0].highest:
        raise UsageError(
            [
                f"--lr_scheduler_type {name} gives every group the rates of --lr_scheduler_args, whatever its own: "
                f"{', '.join(map(str, sorted(set(rates))))} were asked for. Give its arguments as lists of {len(rates)} "
                "values, one for each group, or every part the same rate."
            ]
        )
