"""Under which names a run's numbers go to trackers: those that dashboards made for sd-scripts look for, script by script."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ScalarNames:
    """The names one script uses."""

    loss: str
    """Of a batch."""
    epoch_loss: str
    """The running loss at the end of an epoch."""
    rates: Literal["parts", "parts and numbers", "one"]
    """Learning rates: one for each part; the same and by number too; or that of the first group alone."""


SCALAR_NAMES: Mapping[str, ScalarNames] = {
    "finetuning": ScalarNames("loss", "loss/epoch", "parts"),
    "network_train": ScalarNames("loss/current", "loss/epoch_average", "parts and numbers"),
    "textual_inversion": ScalarNames("loss", "loss/epoch", "one"),
    "lllite_control_net_train": ScalarNames("loss/current", "loss/epoch", "one"),
    "sdxl_control_net_train": ScalarNames("loss/current", "loss/epoch", "one"),
}
"""By the name that a script's trackers have unless another is given."""

AVERAGE = "loss/average"
"""The running loss, in every script."""


def group_names(descriptions: Sequence[str | None], count: int) -> list[str]:
    """Name parameter groups for tables and trackers.

    Args:
        descriptions: what each group trains, such as "unet"; groups beyond the list, or described by None, go by number.
        count: of groups.
    """
    described = [*descriptions, *[None] * count][:count]
    return [name or f"group{number}" for number, name in enumerate(described)]


def rate_scalars(
    groups: Sequence[Mapping[str, Any]],
    descriptions: Sequence[str | None],
    rates: Literal["parts", "parts and numbers", "one"] = "parts",
    *,
    trains_text: bool = False,
) -> dict[str, float]:
    """Name the learning rates of an optimizer's groups.

    Args:
        groups: the optimizer's parameter groups. Optimizers that find their own rate keep a factor `d` there, which multiplies it.
        descriptions: see `group_names`.
        rates: see `ScalarNames`.
        trains_text: whether the first group is of a text encoder; by number it is called `textencoder` then.
    """
    if rates == "one":
        return _named(groups[0], "lr", "lr/d*lr")
    values: dict[str, float] = {}
    for name, group in zip(group_names(descriptions, len(groups)), groups, strict=True):
        values |= _named(group, f"lr/{name}", f"lr/d*lr/{name}")
    if rates == "parts and numbers":
        for index, group in enumerate(groups):
            if index == 0 and trains_text:
                values["lr/textencoder"] = float(group["lr"])
            else:
                values |= _named(group, f"lr/group{index}", f"lr/d*lr/group{index}")
        values |= {name: value for name, value in _named(groups[0], "lr", "lr/d*lr").items() if name != "lr"}
    return values


def _named(group: Mapping[str, Any], name: str, adapted: str) -> dict[str, float]:
    rate = float(group["lr"])
    return {name: rate, adapted: float(group["d"]) * rate} if "d" in group else {name: rate}
