"""What the options of a run say of its optimizer and schedule, kept while a saved state is loaded into them."""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnSettings:
    """Settings of each parameter group, and the rates that the schedule multiplies.

    PyTorch stores both with the state and would bring back those of the run that saved it, whatever this run was told.
    """

    groups: Sequence[dict[str, Any]]
    rates: Sequence[Any]

    @classmethod
    def of(cls, optimizer: Any, schedule: LRScheduler) -> "OwnSettings":
        """Read the settings before a state is loaded.

        Args:
            optimizer: as `make_optimizer` gives it, or wrapped by accelerate.
            schedule: of it.
        """
        inner = getattr(optimizer, "optimizer", optimizer)
        # what the class is made from is a setting; what else is in a group, such as Prodigy's `d`, came about in training
        names = inspect.signature(type(inner).__init__).parameters.keys() - {"self", "params", "lr"} | {"initial_lr"}
        groups = [{name: value for name, value in group.items() if name in names} for group in inner.param_groups]
        return cls(groups, list(schedule.base_lrs))

    def put_back(self, optimizer: Any, schedule: LRScheduler) -> None:
        """Let the settings hold again after a state was loaded, with the rate they have at the schedule's place."""
        groups = getattr(optimizer, "optimizer", optimizer).param_groups
        rates_before = [group["lr"] for group in groups]
        for position, (group, own) in enumerate(zip(groups, self.groups, strict=True)):
            saved_rate, own_rate = group.get("initial_lr"), own.get("initial_lr")
            group.update(own)
            if isinstance(schedule, LambdaLR):
                group["lr"] = self.rates[position] * schedule.lr_lambdas[position](schedule.last_epoch)
            elif saved_rate and own_rate and saved_rate != own_rate:
                group["lr"] *= own_rate / saved_rate
        schedule.base_lrs = list(self.rates)
        schedule._last_lr = [group["lr"] for group in groups]
        changed = [(old, group["lr"]) for old, group in zip(rates_before, groups, strict=True) if old != group["lr"]]
        if changed:
            log.warning("The learning rate goes on at %g; in the state it was %g.", changed[0][1], changed[0][0])
