"""What a person sees of a run while it trains: the running loss, the progress bar and the lines at the start.

The loop never waits for a number: losses are copied off the device in the background (`AsyncScalars`) and shown when they arrive.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library.training.async_scalars import AsyncScalars
from library.training.events import EventLog
from library.training.position import Position
from library.training.progress import Progress
from library.training.scalar_names import AVERAGE, SCALAR_NAMES, ScalarNames, rate_scalars
from library.training.step_meter import StepFigures, StepMeter
from library.training.trackers import RunLog, Scalars


class LossRecorder:
    """The average loss over a sliding window one epoch long.

    In the first epoch values are appended; in later ones each replaces the value that the same batch position had an epoch ago.
    Positions that were never seen, after a start in mid-epoch, do not count.
    """

    def __init__(self) -> None:
        self._losses: list[float | None] = []
        self._total = 0.0
        self._count = 0

    def add(self, epoch: int, index: int, loss: float) -> None:
        """Take the loss of a batch; one that is not finite does not count.

        Args:
            epoch: 1-based.
            index: 0-based position of the batch in its epoch.
            loss: mean over the batch.
        """
        if epoch == 1:
            self._losses.append(None)
            index = len(self._losses) - 1
        elif index >= len(self._losses):
            self._losses.extend([None] * (index + 1 - len(self._losses)))
        if not math.isfinite(loss):
            return
        old = self._losses[index]
        self._losses[index] = loss
        self._total += loss - (old or 0.0)
        self._count += old is None

    @property
    def average(self) -> float:
        """The average of the window; NaN before the first loss."""
        return self._total / self._count if self._count else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """Return the window for a saved state, so that a resumed run shows the same average."""
        return {"losses": list(self._losses), "total": self._total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the window of a saved state."""
        self._losses = list(state["losses"])
        self._total = float(state["total"])
        self._count = sum(loss is not None for loss in self._losses)


Gauges = Mapping[str, Tensor | float]
"""What is measured after an update, by the names trackers know; tensors () stay on the device until they have arrived."""


def measured(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Return arrived values by name.

    Networks without own bookkeeping report zeros where no norm was limited: that is no measurement.
    """
    found = dict(zip(names, values, strict=True))
    limits = [name for name in found if name.startswith("max_norm/") or name == "norm/avg_key_norm"]
    return found if any(found[name] for name in limits) else {name: found[name] for name in found if name not in limits}


def progress_figures(average: float, rates: Scalars, gauges: Scalars) -> dict[str, str]:
    """Return what stands behind the progress bar: running loss, the first group's learning rate, and norms where limited."""
    shown = {"avr_loss": f"{average:.4g}", "lr": f"{next(iter(rates.values())):.3g}"}
    if "max_norm/keys_scaled" in gauges:
        shown["Keys Scaled"] = f"{gauges['max_norm/keys_scaled']:.0f}"
        shown["Average key norm"] = f"{gauges['norm/avg_key_norm']:.4g}"
    return shown


@dataclass(frozen=True)
class RunSummary:
    """The figures a person wants to check before waiting for hours."""

    num_train_images: int
    """Images times repeats."""
    num_reg_images: int
    num_validation_images: int
    batches_per_epoch: int
    """Of one process."""
    num_epochs: int
    batch_sizes: Sequence[int]
    num_processes: int
    accumulation: int
    total_updates: int
    loss_terms: Sequence[str]
    """What the loss is made of, one phrase each."""

    def lines(self) -> list[str]:
        """Return the lines printed when training starts."""
        sizes = ", ".join(str(size) for size in sorted(set(self.batch_sizes)))
        return [
            f"  training images × repeats: {self.num_train_images}",
            f"  regularisation images: {self.num_reg_images}",
            f"  validation images: {self.num_validation_images}",
            f"  batches per epoch: {self.batches_per_epoch}",
            f"  epochs: {self.num_epochs}",
            f"  batch size: {sizes}; processes: {self.num_processes}; gradient accumulation: {self.accumulation}",
            f"  total optimizer steps: {self.total_updates}",
            *(f"  {term}" for term in self.loss_terms),
        ]


class _Batch(NamedTuple):
    """What a loss on its way belongs to."""

    epoch: int
    batch: int
    rates: dict[str, float]
    rates_of_parts: dict[str, float]


class _Update(NamedTuple):
    """What follows the losses of the batches that an update was made of."""

    epoch: int
    update: int
    figures: StepFigures
    gauges: tuple[str, ...]


class TrainingLog:
    """Looks on while a run trains: keeps the running loss, draws the progress bar, fills the trackers and writes events.

    Losses reach it while still on the device and are shown a little later, when they have arrived; nothing waits for them but the
    end of an epoch, a saved state and the end of the run.

    Args:
        trackers: of the run.
        progress: the bar.
        groups: the optimizer's parameter groups, as they are at the time of asking.
        descriptions: what each group trains, see `rate_scalars`.
        gauges: asked after each update for what else was measured.
        names: of the script's scalars.
        trains_text: see `rate_scalars`.
        events: of the run.
        meter: knows how long the last update took and what memory it needed.
    """

    def __init__(
        self,
        trackers: RunLog,
        progress: Progress,
        groups: Callable[[], Sequence[Mapping[str, Any]]],
        descriptions: Sequence[str | None],
        gauges: Callable[[], Gauges] = dict,
        names: ScalarNames = SCALAR_NAMES["network_train"],
        trains_text: bool = False,
        events: EventLog | None = None,
        meter: StepMeter | None = None,
    ) -> None:
        self.losses = LossRecorder()
        self._trackers = trackers
        self._progress = progress
        self._groups = groups
        self._descriptions = descriptions
        self._gauges = gauges
        self._names = names
        self._trains_text = trains_text
        self._events = events or EventLog()
        self._meter = meter or StepMeter()
        self._feed = AsyncScalars()
        self._window: list[tuple[_Batch, float]] = []
        self._here = Position()
        self._has_started = False

    def observe_loss(self, loss: Tensor) -> None:
        """Take the mean loss () of the next batch, wherever it is."""
        if not self._has_started:
            self._has_started = True
            self._progress.start_clock()
        rates = rate_scalars(self._groups(), self._descriptions, self._names.rates, trains_text=self._trains_text)
        of_parts = rate_scalars(self._groups(), self._descriptions)
        self._feed.push(_Batch(self._here.epoch, self._here.batch, rates, of_parts), loss)
        self._here = replace(self._here, batch=self._here.batch + 1)

    def before_training(self, position: Position) -> None:
        """Start counting where the run stands."""
        self._here = position

    def after_update(self, position: Position) -> None:
        """Count an update and show the losses that have arrived."""
        gauges = self._gauges()
        values = on_one_device(list(gauges.values()))
        self._feed.push(_Update(position.epoch, position.update, self._meter.read(), tuple(gauges)), values)
        self._here = position
        self._show(self._feed.ready())
        self._progress.advance()

    def after_epoch(self, position: Position) -> None:
        """Record the average loss of the epoch."""
        self._show(self._feed.drain())
        self._trackers.epoch({self._names.epoch_loss: self.losses.average}, position.epoch, position.update)
        self._here = position.next_epoch()

    def after_training(self, position: Position) -> None:
        """Show what is still on its way."""
        self._show(self._feed.drain())

    def average(self) -> float:
        """Return the running loss; waits for losses on their way."""
        self._show(self._feed.drain())
        return self.losses.average

    def state_dict(self) -> dict[str, Any]:
        """Return the running loss for a saved state; waits for losses on their way."""
        self._show(self._feed.drain())
        return self.losses.state_dict()

    def close(self) -> None:
        """Show what is still on its way, end the bar and write the trackers out."""
        self._show(self._feed.drain())
        self._progress.close()
        self._trackers.close()

    def _show(self, arrived: Iterable[tuple[Any, Any]]) -> None:
        for tag, value in arrived:
            if isinstance(tag, _Batch):
                self._window.append((tag, value))
            else:
                self._show_update(tag, value)

    def _show_update(self, made: _Update, values: Sequence[float]) -> None:
        """Show what an update's batches gave; several batches share one position in the trackers."""
        gauges = measured(made.gauges, values)
        window, self._window = self._window, []
        for batch, loss in window:
            self.losses.add(batch.epoch, batch.batch, loss)
            scalars = {self._names.loss: loss, AVERAGE: self.losses.average, **batch.rates, **gauges}
            self._trackers.step(scalars, made.update, made.epoch)
        rates = window[-1][0].rates_of_parts
        self._progress.show(progress_figures(self.losses.average, rates, gauges))
        self._events.write(
            "step",
            step=made.update,
            epoch=made.epoch,
            loss=sum(loss for _, loss in window) / len(window),
            average=self.losses.average,
            lr={name.removeprefix("lr/"): rate for name, rate in rates.items()},
            seconds=made.figures.seconds,
            memory=made.figures.memory,
            **({"norms": gauges} if gauges else {}),
        )


def on_one_device(values: Sequence[Tensor | float]) -> Tensor:
    """Put numbers into one tensor (n,), float32, on the device of the first that is on one; without waiting for it."""
    device = next((value.device for value in values if isinstance(value, Tensor)), None)
    tensors = [torch.as_tensor(value, dtype=torch.float32).to(device, non_blocking=True).reshape(()) for value in values]
    return torch.stack(tensors) if tensors else torch.empty(0)
