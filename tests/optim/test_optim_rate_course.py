"""What is told of a rate before the run is what the run does."""

import pytest
import torch

from library.optim.optimizers import make_optimizer
from library.optim.rate_course import RateCourse, rate_courses
from library.optim.schedules import make_schedule
from library.options.errors import UsageError
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.scheduler import SchedulerOptions

ONE_CYCLE = {"lr_scheduler_type": "OneCycleLR"}


def groups(*rates: float | None) -> list[dict]:
    made = [{"params": [torch.nn.Parameter(torch.zeros(3))], "lr": rate} for rate in rates]
    return [{key: value for key, value in group.items() if value is not None} for group in made]


def courses(
    scheduler: SchedulerOptions, of: list[dict], first: int = 0, total: int = 40, optimizer: OptimizerOptions | None = None
) -> list[RateCourse] | None:
    optimizer = optimizer or OptimizerOptions(learning_rate=1e-3)
    defaults = make_optimizer(optimizer, of).defaults
    return rate_courses(scheduler, optimizer, of, defaults, first, total)


@pytest.mark.parametrize("first", [0, 7, 39])
@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler": "constant"},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 10},
        {"lr_scheduler": "linear", "lr_warmup_steps": 0.5},
        {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3},
        {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 5, "lr_decay_steps": 10, "lr_scheduler_min_lr_ratio": 0.1},
        {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules='1:10,3:20,0.01'",)},
        {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ("T_max=30", "eta_min=1e-5")},
        ONE_CYCLE | {"lr_scheduler_args": ("max_lr=[1e-3, 5e-4, 1e-4]", "total_steps=40")},
    ],
    ids=lambda options: str(next(iter(options.values()))),
)
def test_the_rates_told_are_those_of_the_run(options, first) -> None:
    scheduler, optimizer_options, of = SchedulerOptions(**options), OptimizerOptions(learning_rate=1e-3), groups(2e-3, 5e-4, None)
    told = courses(scheduler, of, first)
    optimizer = make_optimizer(optimizer_options, of)
    schedule = make_schedule(scheduler, optimizer_options, optimizer, 40)
    used = []
    for _ in range(40):
        used.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        if len(used) < 40:
            schedule.step()
    of_groups = list(zip(*used[first:], strict=True))
    assert told is not None
    assert [course.first for course in told] == pytest.approx([rates[0] for rates in of_groups], rel=1e-12)
    assert [course.highest for course in told] == pytest.approx([max(rates) for rates in of_groups], rel=1e-12)
    assert [course.last for course in told] == pytest.approx([rates[-1] for rates in of_groups], rel=1e-12)


def test_adafactor_that_sets_its_rates_has_no_course_and_schedule_free_rates_stay() -> None:
    assert courses(SchedulerOptions(), groups(1e-3), optimizer=OptimizerOptions(optimizer_type="Adafactor")) is None
    free = OptimizerOptions(optimizer_type="AdamWScheduleFree", learning_rate=1e-3)
    told = courses(SchedulerOptions(lr_scheduler="cosine", lr_warmup_steps=5), groups(2e-3), optimizer=free)
    assert told == [RateCourse(2e-3, 2e-3, 2e-3)]


def test_a_schedule_that_gives_parts_of_different_rates_the_same_one_is_refused() -> None:
    scheduler = SchedulerOptions(**ONE_CYCLE, lr_scheduler_args=("max_lr=1e-3", "total_steps=40"))
    with pytest.raises(UsageError, match=r"OneCycleLR gives every group the rates of .* 0\.0005, 0\.002 were asked for"):
        courses(scheduler, groups(2e-3, 5e-4))
    assert courses(scheduler, groups(2e-3, 2e-3)) is not None


def test_a_schedule_that_ends_before_the_run_is_refused_before_it() -> None:
    scheduler = SchedulerOptions(**ONE_CYCLE, lr_scheduler_args=("max_lr=1e-3", "total_steps=25"))
    with pytest.raises(UsageError, match="OneCycleLR ends after 26 of 40 updates"):
        courses(scheduler, groups(1e-3))
