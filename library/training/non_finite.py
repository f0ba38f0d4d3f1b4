"""Notices the first update whose loss or gradient was not finite, while nobody waits for the device (`--on_non_finite`)."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.dataset.batch import Batch
from library.optim.finite import FiniteGate
from library.training.async_scalars import AsyncScalars
from library.training.logs import on_one_device
from library.training.position import Position

MOST_IN_A_ROW = 20
"""Updates that may be void one after the other. Float16 gradients overflow now and then, and often at first, while their scale is
found; twenty halvings bring it from its beginning, 65536, below 1."""
_LAG = 2
"""Updates a GPU may be behind when it is asked: it has this much to do, so it never idles, and all processes learn it at the same
place."""


class Unguarded:
    """Lets everything pass: what the loop tells of its updates."""

    def begin_batch(self, batch: Batch, epoch: int, index: int, loss: Tensor) -> None:
        """Called between forward and backward pass, with the loss () in this process."""

    def add_loss(self, loss: Tensor) -> None:
        """Called with the mean of each loss over the processes, before the update."""

    def finish_update(self, was_made: bool) -> None:
        """Called after the optimizer's step, before the schedule's; whether no float16 overflow made the update void."""


@dataclass(frozen=True)
class Taken:
    """A batch that an update is made of."""

    batch: Batch
    """As the loader gave it."""
    epoch: int
    index: int


@dataclass(frozen=True)
class Spoiled:
    """An update that was not finite."""

    before: Position
    """Where the run stood before it."""
    batches: Sequence[Taken]
    """Of this process."""
    losses: Sequence[float]
    """Of these batches."""
    overflowed: bool
    """Whether it was void because float16 gradients overflowed."""


@dataclass(frozen=True)
class _Update:
    before: Position
    batches: tuple[Taken, ...]
    was_made: bool
    undo: Callable[[], None]


class FiniteGuard(Unguarded):
    """The observer that looks whether updates were finite; it comes before all others.

    Args:
        gate: of the updater.
        schedule: of the learning rate.
        groups: the optimizer's parameter groups, as they are at the time of asking.
        device: the run's.
        stops: whether the first update that is not finite ends the run.
        scales: whether float16 gradients are scaled, which makes void updates normal.
        must_know: whether the answer is wanted at once at a place, because something is saved there.
        tell: called with an update that was left out, once the run goes on.
        end: called when the run must end, with schedule and groups as they were before the update; raises.
    """

    def __init__(
        self,
        gate: FiniteGate,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        groups: Callable[[], Sequence[dict[str, Any]]],
        device: torch.device,
        *,
        stops: bool,
        scales: bool,
        must_know: Callable[[Position], bool],
        tell: Callable[[Spoiled], None],
        end: Callable[[Spoiled, Position], None],
    ) -> None:
        self._gate = gate
        self._schedule = schedule
        self._groups = groups
        self._lag = 0 if device.type == "cpu" else _LAG
        self._stops = stops
        self._scales = scales
        self._must_know = must_know
        self._tell = tell
        self._end = end
        self._here = Position()
        self._window: list[Taken] = []
        self._losses: list[Tensor] = []
        self._undo: Callable[[], None] = lambda: None
        self._was_made = True
        self._in_a_row = 0
        self._feed = AsyncScalars()

    def begin_batch(self, batch: Batch, epoch: int, index: int, loss: Tensor) -> None:
        """Keep the batch until it is known to be good."""
        if not self._window:
            self._undo = self._remember()
        self._window.append(Taken(batch, epoch, index))
        self._losses.append(loss)
        if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
            self._gate.add(loss)  # before the backward pass, in which parameters may be stepped already

    def add_loss(self, loss: Tensor) -> None:
        """Let the update depend on the loss, which is the same in every process."""
        self._gate.add(loss)

    def finish_update(self, was_made: bool) -> None:
        """Note whether it was made."""
        self._was_made = was_made

    def before_training(self, position: Position) -> None:
        """Start counting where the run stands."""
        self._here = position

    def after_update(self, position: Position) -> None:
        """Send off what tells of this update, and judge those that have had time to arrive."""
        update = _Update(self._here, tuple(self._window), self._was_made, self._undo)
        self._feed.push(update, on_one_device([*self._losses, self._gate.take()]))
        self._window, self._losses, self._here = [], [], position
        self._judge(self._feed.drain(0 if self._must_know(position) else self._lag))

    def after_epoch(self, position: Position) -> None:
        """Judge all, before anything is saved."""
        self._judge(self._feed.drain())
        self._here = position.next_epoch()

    def after_training(self, position: Position) -> None:
        """Judge all, before the model is saved."""
        self._judge(self._feed.drain())

    def _judge(self, arrived: Iterable[tuple[_Update, list[float]]]) -> None:
        for update, (*losses, is_finite) in arrived:
            overflowed = self._scales and not update.was_made and bool(is_finite)
            if is_finite and not overflowed:
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            spoiled = Spoiled(update.before, update.batches, losses, overflowed)
            if self._in_a_row >= MOST_IN_A_ROW or (self._stops and not overflowed):
                if self._stops and not self._scales:
                    update.undo()
                    self._end(spoiled, update.before)
                self._end(spoiled, self._here)
            elif not overflowed:
                self._tell(spoiled)

    def _remember(self) -> Callable[[], None]:
        """Return what brings schedule and rates back to how they are now; weights and state are the gate's affair."""
        schedule = copy.deepcopy(self._schedule.state_dict())
        kept = [
            {key: value for key, value in group.items() if key != "params" and not isinstance(value, Tensor)}
            for group in self._groups()
        ]

        def undo() -> None:
            self._schedule.load_state_dict(schedule)
            for group, values in zip(self._groups(), kept, strict=True):
                group.update(values)

        return undo
