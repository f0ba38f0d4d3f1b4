"""Checks of the optimizer and the learning-rate schedule that need no torch: names, arguments and what goes together."""

import ast
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.scheduler import SchedulerOptions
from library.options.nearest import did_you_mean, nearest
from library.options.optimizer_choices import (
    FULL_PATHS,
    ONE_RATE,
    OPTIMIZERS,
    PIP_NAMES,
    POLYNOMIAL_LR_END,
    RAMP_SHAPES,
    SCHEDULES,
    SELF_TUNING,
    STEPPED_ALONE,
    STEPPED_TOGETHER,
    TORCH_OPTIMIZERS,
    UNCORRECTED,
    OptimizerChoice,
)


def check_optimizer_options(optimizer: OptimizerOptions, scheduler: SchedulerOptions) -> list[str]:
    """Return what is wrong with the optimizer and the schedule, one sentence each; empty when all is well."""
    return [*optimizer_problems(optimizer), *schedule_problems(scheduler, optimizer)]


def read_arguments(items: Sequence[str] | None, flag: str) -> tuple[dict[str, Any], list[str]]:
    """Read `key=value` texts whose values are Python literals; `betas=0.9,0.999` is a pair.

    Args:
        items: what was given, or None.
        flag: the option, for messages.

    Returns:
        The arguments that could be read, and one sentence for each that could not.
    """
    arguments, problems = {}, []
    for item in items or ():
        key, equals, text = item.partition("=")
        if not key or not equals:
            problems.append(f"{flag}: {item!r} is not key=value. Write for example weight_decay=0.01.")
            continue
        try:
            arguments[key.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            problems.append(f"{flag}: {item!r}: {text!r} is not a Python literal. {_literal_hint(key, text)}")
    return arguments, problems


def _literal_hint(key: str, text: str) -> str:
    if text.capitalize() in ("True", "False", "None"):
        return f"Write {key}={text.capitalize()}."
    return (
        f"A text carries its own quotes, as in \"{key}='{text}'\"; numbers, True, False, None and (0.9, 0.99) are written plainly."
    )


def optimizer_name(options: OptimizerOptions) -> str:
    """Return the name that was asked for, the old spellings and the default included."""
    if options.optimizer_type:
        return options.optimizer_type
    return "AdamW8bit" if options.use_8bit_adam else "Lion" if options.use_lion_optimizer else "AdamW"


def named_optimizer(options: OptimizerOptions) -> OptimizerChoice | None:
    """Return the record of a built-in name, whatever its letter case; None for classes of torch.optim and full paths."""
    return OPTIMIZERS.get(optimizer_name(options).lower())


def class_path(options: OptimizerOptions) -> str:
    """Return `package.module.Class` of the optimizer that was asked for."""
    name, choice = optimizer_name(options), named_optimizer(options)
    return choice.class_path if choice else name if "." in name else f"torch.optim.{name}"


def optimizer_arguments(options: OptimizerOptions) -> dict[str, Any]:
    """Return the arguments of the optimizer beside its rate: the defaults of the name, then what `--optimizer_args` gives."""
    choice = named_optimizer(options)
    given, _ = read_arguments(options.optimizer_args, "--optimizer_args")
    arguments = {**(choice.defaults if choice else {}), **given}
    if is_adafactor(options) and arguments.get("warmup_init"):
        arguments["relative_step"] = True
    return arguments


def is_adafactor(options: OptimizerOptions) -> bool:
    """Whether the built-in name Adafactor was chosen."""
    return optimizer_name(options).lower() == "adafactor"


def sets_its_own_rate(options: OptimizerOptions) -> bool:
    """Whether the optimizer is Adafactor with relative steps, which ignores learning rates and schedules."""
    return is_adafactor(options) and bool(optimizer_arguments(options)["relative_step"])


def is_schedule_free(options: OptimizerOptions) -> bool:
    """Whether the optimizer is one of the schedule-free family, which ignores schedules."""
    return optimizer_name(options).lower().endswith("schedulefree")


def finds_its_rate(options: OptimizerOptions) -> bool:
    """Whether the optimizer finds the rate itself, of which learning rates are factors that should be near 1."""
    return class_path(options).startswith(SELF_TUNING)


def begins_uncorrected(options: OptimizerOptions) -> bool:
    """Whether the first steps are several times longer than later ones, as the averages they are made of begin with zero."""
    return class_path(options) in UNCORRECTED and not optimizer_arguments(options).get("use_bias_correction")


def steps_alone(options: OptimizerOptions) -> bool:
    """Whether the optimizer computes the step of each parameter from that parameter alone, so that parameters can be stepped apart.

    A class of a package that is not known to do so is taken not to.
    """
    path = class_path(options)
    return path.startswith(STEPPED_ALONE) and path not in STEPPED_TOGETHER


def fused_problems(options: OptimizerOptions, accumulation: int, mixed_precision: str) -> Iterator[str]:
    """Yield what keeps parameters from being stepped inside the backward pass, where that was asked for.

    Args:
        options: `--fused_backward_pass`, `--fused_optimizer_groups` and the optimizer.
        accumulation: `--gradient_accumulation_steps`.
        mixed_precision: "no", "fp16" or "bf16".
    """
    wanted = {"fused_backward_pass": options.fused_backward_pass, "fused_optimizer_groups": options.fused_optimizer_groups}
    flags = [f"--{name}" for name, value in wanted.items() if value]
    if not flags:
        return
    if len(flags) > 1:
        yield f"{flags[0]} and {flags[1]} exclude each other. Choose one; the first needs less memory."
    if accumulation > 1:
        yield (
            f"{flags[0]} drops gradients in the backward pass, so --gradient_accumulation_steps {accumulation} has nothing to "
            "add up. Leave one of them out; a larger --train_batch_size has the same effect as accumulation."
        )
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":  # as launchers set it
        yield (
            f"{flags[0]} steps a parameter before the {processes} processes have exchanged its gradient, so they would drift "
            "apart. Train in one process, or leave the option out."
        )
    if mixed_precision == "fp16":
        yield f"{flags[0]} cannot undo the gradient scaling of --mixed_precision fp16 in time. Use --mixed_precision bf16 or no."
    if not steps_alone(options):
        yield (
            f"{flags[0]} steps parameters apart, but {optimizer_name(options)} steps all of them at once, or is not known to do "
            "otherwise. Choose another --optimizer_type, such as Adafactor or AdamW8bit."
        )


def host_state_problems(options: OptimizerOptions, mixed_precision: str, *, is_divided: bool) -> Iterator[str]:
    """Yield what keeps the optimizer's state from lying in main memory, where that was asked for.

    Args:
        options: of the optimizer.
        mixed_precision: "no", "fp16" or "bf16".
        is_divided: whether DeepSpeed or FSDP divides the state over processes.
    """
    if options.optimizer_states != "host":
        return
    name = optimizer_name(options)
    if is_divided:
        yield "--optimizer_states host is not for DeepSpeed and FSDP, which place states themselves."
    if mixed_precision == "fp16":
        yield "--optimizer_states host cannot step in parts under the gradient scaling of --mixed_precision fp16. Use bf16 or no."
    if class_path(options).startswith("bitsandbytes.optim.Paged"):
        yield f"--optimizer_states host: {name} moves its state itself. Choose one of the two, or {name.replace('Paged', '')}."
    elif not steps_alone(options):
        yield (
            f"--optimizer_states host steps parameters in parts, but {name} steps all of them at once, or is not known to do "
            "otherwise. Choose another --optimizer_type, such as AdamW or AdamW8bit."
        )


def optimizer_problems(options: OptimizerOptions) -> list[str]:
    """Return what is wrong with the optimizer options, one sentence each."""
    arguments, problems = read_arguments(options.optimizer_args, "--optimizer_args")
    problems += _spelling_problems(options)
    problems += _name_problems(optimizer_name(options))
    if "lr" in arguments:
        problems.append("--optimizer_args: lr is the learning rate itself. Give it with --learning_rate.")
    if options.learning_rate < 0:
        problems += negative_rate_problems(options, [options.learning_rate])
    return problems


def negative_rate_problems(options: OptimizerOptions, rates: Sequence[float]) -> list[str]:
    """Return one sentence if a rate is negative and the optimizer cannot step uphill: only Adafactor with fixed rates can."""
    negative = [rate for rate in rates if rate < 0]
    if not negative or (is_adafactor(options) and not sets_its_own_rate(options)):
        return []
    return [
        f"The learning rate {negative[0]} is negative, which {optimizer_name(options)} cannot use. Give a positive rate, or train "
        "away from the data with --optimizer_type Adafactor --optimizer_args relative_step=False scale_parameter=False."
    ]


def one_rate_problems(options: OptimizerOptions, rates: Sequence[float]) -> list[str]:
    """Return one sentence if parts have different rates and the optimizer would give all of them the same.

    Args:
        options: the optimizer.
        rates: of the parts that are trained; 0 for one that is not.
    """
    different = sorted({rate for rate in rates if rate})
    if len(different) < 2 or not class_path(options).startswith(ONE_RATE):
        return []
    return [
        f"{optimizer_name(options)} finds one rate for everything that is trained and cannot follow the different learning rates "
        f"{', '.join(map(str, different))}. Give every part the same, or take --optimizer_type "
        "prodigyplus.ProdigyPlusScheduleFree, which finds one for each part."
    ]


def _spelling_problems(options: OptimizerOptions) -> Iterator[str]:
    given = {"--use_8bit_adam": options.use_8bit_adam, "--use_lion_optimizer": options.use_lion_optimizer}
    given |= {f"--optimizer_type {options.optimizer_type}": bool(options.optimizer_type)}
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        yield f"{' and '.join(names)} both choose the optimizer. Keep one; --optimizer_type is the newer spelling."


def _name_problems(name: str) -> Iterator[str]:
    choice = OPTIMIZERS.get(name.lower())
    if choice is None and "." not in name and name not in TORCH_OPTIMIZERS:
        yield unknown_optimizer(name)
        return
    package = (choice.class_path if choice else name if "." in name else "torch").partition(".")[0]
    if importlib.util.find_spec(package) is None:
        yield missing_package(f"--optimizer_type {name}", package)


def did_you_mean_class(name: str, classes: Iterable[str]) -> str:
    """Return " Did you mean …?" naming the nearest class, letter case aside, or nothing."""
    by_lower = {known.lower(): known for known in classes}
    found = nearest(name, by_lower)
    return f" Did you mean {by_lower[found]}?" if found else ""


def unknown_optimizer(name: str) -> str:
    """Say that there is no such optimizer, with the nearest names."""
    built_in = [choice.name for choice in OPTIMIZERS.values()]
    hint = did_you_mean_class(name, (*TORCH_OPTIMIZERS, *built_in))
    if full_path := FULL_PATHS.get(name.lower()):
        hint = f" Did you mean {full_path}?"
    return (
        f"--optimizer_type: there is no optimizer {name!r}.{hint} Choose {', '.join(built_in)}, a class of torch.optim such as "
        f"{', '.join(TORCH_OPTIMIZERS)} (spelled exactly so), or the full path of a class such as bitsandbytes.optim.AdEMAMix8bit."
    )


def missing_package(what: str, package: str) -> str:
    """Say that a package is not installed, and how to install it."""
    pip = PIP_NAMES.get(package, package)
    return f"{what} needs the package {package}, which is not installed. Run: pip install {pip}"


def schedule_problems(options: SchedulerOptions, optimizer: OptimizerOptions) -> list[str]:
    """Return what is wrong with the learning-rate schedule, one sentence each.

    Args:
        options: the schedule options.
        optimizer: the optimizer options, as some optimizers set their rate themselves and one schedule needs the rate.
    """
    if is_schedule_free(optimizer):
        return []
    arguments, problems = read_arguments(options.lr_scheduler_args, "--lr_scheduler_args")
    if sets_its_own_rate(optimizer):
        return [*problems, *_relative_step_problems(options)]
    if options.lr_scheduler_type:
        return [*problems, *_schedule_class_problems(options)]
    name = options.lr_scheduler
    if name not in SCHEDULES:
        return [*problems, _unknown_schedule(name)]
    problems += [_unknown_argument(name, key) for key in arguments if key not in SCHEDULES[name]]
    return [*problems, *_named_schedule_problems(options, optimizer, arguments)]


def _relative_step_problems(options: SchedulerOptions) -> Iterator[str]:
    why = "Adafactor sets its own rate unless --optimizer_args relative_step=False is given"
    if options.lr_warmup_steps:
        yield f"--lr_warmup_steps {options.lr_warmup_steps}: {why}; leave the warm-up out, or use warmup_init=True."
    if options.lr_scheduler_type:
        yield f"--lr_scheduler_type {options.lr_scheduler_type}: {why}; leave the schedule out."


def _schedule_class_problems(options: SchedulerOptions) -> Iterator[str]:
    name = options.lr_scheduler_type
    if options.lr_warmup_steps:
        yield f"--lr_warmup_steps {options.lr_warmup_steps} has no effect on --lr_scheduler_type {name}. Leave it out."
    package = name.partition(".")[0] if "." in name else "torch"
    if importlib.util.find_spec(package) is None:
        yield missing_package(f"--lr_scheduler_type {name}", package)


def _unknown_schedule(name: str) -> str:
    if name.partition(":")[0] == "adafactor":
        return f"--lr_scheduler {name} belongs to --optimizer_type Adafactor with relative_step=True. Choose constant."
    if name in ("reduce_lr_on_plateau", "cosine_warmup_with_min_lr"):
        instead = {"cosine_warmup_with_min_lr": "cosine_with_min_lr"}.get(name, "cosine or constant")
        return f"--lr_scheduler {name} is not supported. Choose {instead}."
    return f"--lr_scheduler: there is no schedule {name!r}.{did_you_mean(name, SCHEDULES)} Choose {', '.join(SCHEDULES)}."


def _unknown_argument(schedule: str, key: str) -> str:
    allowed = ", ".join(SCHEDULES[schedule]) or "no arguments"
    return f"--lr_scheduler_args: {schedule} does not know {key!r}. It takes {allowed}; the rest has options of its own."


def _named_schedule_problems(options: SchedulerOptions, optimizer: OptimizerOptions, arguments: dict[str, Any]) -> Iterator[str]:
    name = options.lr_scheduler
    if name == "constant" and options.lr_warmup_steps:
        yield f"--lr_warmup_steps {options.lr_warmup_steps}: constant has no warm-up. Choose --lr_scheduler constant_with_warmup."
    if name == "cosine_with_min_lr":
        given = [options.lr_scheduler_min_lr_ratio is not None, "min_lr" in arguments]
        if sum(given) != 1:
            yield "--lr_scheduler cosine_with_min_lr needs one of --lr_scheduler_min_lr_ratio and --lr_scheduler_args min_lr=…"
    lr_end = arguments.get("lr_end", POLYNOMIAL_LR_END)
    if name == "polynomial" and optimizer.learning_rate <= lr_end:
        yield (
            f"--lr_scheduler polynomial ends at {lr_end}, which is not below --learning_rate {optimizer.learning_rate}. "
            "Set a lower end with --lr_scheduler_args lr_end=…"
        )
    if name == "piecewise_constant" and step_rules(arguments.get("step_rules")) is None:
        yield (
            f"--lr_scheduler piecewise_constant: step_rules is {arguments.get('step_rules')!r}. Give for example "
            "--lr_scheduler_args \"step_rules='1:10,0.1:50,0.01'\": factor 1 up to update 10, 0.1 up to update 50, then 0.01."
        )
    for key in ("warmup_type", "decay_type"):
        if arguments.get(key, "linear") not in RAMP_SHAPES:
            yield f"--lr_scheduler_args: {key} is {arguments[key]!r}. Choose {', '.join(RAMP_SHAPES)}."


def step_rules(text: Any) -> tuple[list[tuple[int, float]], float] | None:
    """Read `factor:update,…,factor`.

    Returns:
        The updates at which each factor ends, ascending, and the factor after the last; None if the text is something else.
    """
    if not isinstance(text, str):
        return None
    *steps, last = text.split(",")
    try:
        pairs = [rule.split(":") for rule in steps]
        return sorted((int(until), float(factor)) for factor, until in pairs), float(last)
    except ValueError:
        return None
