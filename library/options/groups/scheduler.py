"""Options about the learning rate over time."""

from typing import ClassVar

from library.options.declare import OptionGroup, option


class SchedulerOptions(OptionGroup):
    """The learning-rate schedule. Steps are optimizer steps, whatever the number of processes."""

    topic: ClassVar[str] = "Learning-rate schedule"

    lr_scheduler: str = option(
        "constant",
        "Schedule: constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, inverse_sqrt, "
        "cosine_with_min_lr, warmup_stable_decay, piecewise_constant or adafactor:<initial rate>.",
    )
    lr_scheduler_type: str = option("", "Schedule class instead: a name of torch.optim.lr_scheduler, or package.module.Class.")
    lr_scheduler_args: tuple[str, ...] | None = option(None, "Arguments of the schedule, each key=value with a Python literal.")
    lr_warmup_steps: int | float = option(0, "Steps of warm-up; N% or a number below 1 is a fraction of all steps.", ge=0)
    lr_decay_steps: int | float = option(0, "Steps of decay for warmup_stable_decay, written as for --lr_warmup_steps.", ge=0)
    lr_scheduler_num_cycles: int = option(1, "Number of restarts of cosine_with_restarts.", ge=1)
    lr_scheduler_power: float = option(1, "Exponent of polynomial.")
    lr_scheduler_timescale: int | None = option(None, "Time scale of inverse_sqrt; the warm-up length when left out.", ge=1)
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "Last rate of cosine_with_min_lr as a fraction of the first.", ge=0, le=1
    )
