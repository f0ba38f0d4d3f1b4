"""The table of what is trained: each parameter group with its part of the model, its size, and its learning rate over the run."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from library.optim.rate_course import RateCourse, rate_courses
from library.options.checks_optimizer import finds_its_rate, optimizer_name
from library.training.full_tensors import full_size
from library.training.scalar_names import group_names
from library.training.setting import Setting, Trained

log = logging.getLogger(__name__)

_HEADINGS = ("group", "part", "tensors", "parameters", "lr first", "lr highest", "lr last")
_NUM_TEXTS = 2
"""Columns on the left that are texts; the others are numbers."""


def report_trained(setting: Setting, trained: Trained, defaults: Mapping[str, Any], first_update: int) -> None:
    """Log the table of parameter groups.

    Args:
        setting: of the run.
        trained: what is trained.
        defaults: of the optimizer.
        first_update: updates made before, in a run that is resumed.

    Raises:
        UsageError: see `rate_courses`.
    """
    scheduler, optimizer = setting.options.scheduler, setting.options.optimizer
    courses = rate_courses(scheduler, optimizer, trained.groups, defaults, first_update, setting.length.total_updates)
    lines = group_table(trained, setting.family.part_titles, courses)
    if courses is None:
        lines.append("  Adafactor sets the rates itself; --optimizer_args relative_step=False fixes them.")
    elif finds_its_rate(optimizer):
        lines.append(f"  {optimizer_name(optimizer)} multiplies these rates by the d it finds (lr/d*lr in the logs).")
    log.info("What is trained\n%s", "\n".join(lines))


def group_table(trained: Trained, titles: Mapping[str, str], courses: Sequence[RateCourse] | None) -> list[str]:
    """Return the lines of the table, the heading first and what all groups have together last.

    Args:
        trained: the groups and what describes them.
        titles: see `Family.part_titles`.
        courses: the rate of each group over the run; None where the optimizer sets it.
    """
    names = {id(parameter): name for name, parameter in trained.trainable.module.named_parameters()}
    rows = []
    labels = group_names(trained.descriptions, len(trained.groups))
    for number, (label, group) in enumerate(zip(labels, trained.groups, strict=True)):
        parts = part_of_group([names.get(id(parameter), "") for parameter in group["params"]], titles)
        rates = ["auto"] * 3 if courses is None else [f"{rate:.3g}" for rate in _of(courses[number])]
        rows.append([label, parts, *_size(group["params"]), *rates])
    everything = [parameter for group in trained.groups for parameter in group["params"]]
    return _aligned([list(_HEADINGS), *rows, ["all", "", *_size(everything), "", "", ""]])


def part_of_group(names: Sequence[str], titles: Mapping[str, str]) -> str:
    """Say to which parts of the model parameters belong, such as "U-Net" or "CLIP-L + OpenCLIP bigG".

    Args:
        names: of the parameters in the module that holds them; a part's short name is one of the first words of each, as in
            `te1.text_model.…` of a model and `lora_te1_text_model_…` of a network.
        titles: short name to title.
    """
    words = {next((word for word in re.split(r"[._]", name)[:3] if word in titles), "") for name in names}
    return " + ".join(title for word, title in titles.items() if word in words) or "network"


def _size(parameters: Sequence[nn.Parameter]) -> list[str]:
    """Count tensors and parameters, without those that never get a gradient."""
    trained = [full_size(parameter) for parameter in parameters if parameter.requires_grad]
    return [f"{len(trained):,}", f"{sum(trained):,}"]


def _of(course: RateCourse) -> tuple[float, float, float]:
    return course.first, course.highest, course.last


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Set rows of texts in columns: the first ones begin, the others end, below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if column < _NUM_TEXTS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
