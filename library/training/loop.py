"""The one training loop. Everything an option decides was decided before it starts."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.dataset.batch import Batch
from library.optim.updates import Updater
from library.training.feeding import Sent, sender, sent_ahead
from library.training.interrupt import StopRequest
from library.training.non_finite import Unguarded
from library.training.position import Position, window_size
from library.training.trainable import Trainable


class Observer(Protocol):
    """Something that looks on between updates: saves, samples, logs. Observers are called in the order they are given."""

    def before_training(self, position: Position) -> None:
        """Called once, before the first update of this run."""

    def after_update(self, position: Position) -> None:
        """Called after each optimizer update."""

    def after_epoch(self, position: Position) -> None:
        """Called when all batches of `position.epoch` were trained on."""

    def after_training(self, position: Position) -> None:
        """Called once, after the last update; not called when the run was interrupted before it."""


@dataclass
class TrainingRun:
    """All the loop needs, already built."""

    accelerator: Any
    """`accelerate.Accelerator`."""
    step: nn.Module
    """The prepared `TrainStep`."""
    trainable: Trainable
    updater: Updater
    """Turns gradients into updates of the parameters."""
    schedule: torch.optim.lr_scheduler.LRScheduler
    batches: Callable[[int, int], Iterable[Batch]]
    """(epoch, first batch) to this process's batches of the epoch, from the first one wanted."""
    batches_per_epoch: int
    accumulation: int
    max_updates: int
    seed: int
    observe_loss: Callable[[Tensor], None] = lambda loss: None
    """Receives each batch's loss, the mean over the images of all processes, still on the device; once its update is complete."""
    observers: Sequence[Observer] = field(default_factory=list)
    guard: Unguarded = field(default_factory=Unguarded)
    """Is told what the updates are made of, and keeps what is not finite from the weights."""

    def __post_init__(self) -> None:
        self.updater.before_step = self.trainable.before_step
        self.send = sender(self.accelerator.device)


def train(run: TrainingRun, start: Position, stop: StopRequest) -> Position:
    """Train from `start` until `run.max_updates` updates are made or a stop is asked for.

    Returns:
        Where the run stands at the end.
    """
    notify(run.observers, "before_training", start)
    position = start
    while position.update < run.max_updates and not stop.agreed:
        position = train_epoch(run, position, stop)
        if position.batch == run.batches_per_epoch:
            notify(run.observers, "after_epoch", position)
            position = position.next_epoch()
    if position.update >= run.max_updates:  # also where a stop was asked for in the last step: nothing is left to continue
        notify(run.observers, "after_training", position)
    return position


def train_epoch(run: TrainingRun, position: Position, stop: StopRequest) -> Position:
    """Train on what is left of the epoch; returns early when the run is complete or a stop was asked for."""
    run.trainable.on_epoch_start()
    losses: list[Tensor] = []
    coming = sent_ahead(run.batches(position.epoch, position.batch), run.send)
    for index, sent in enumerate(coming, start=position.batch):
        size = window_size(index, run.batches_per_epoch, run.accumulation)
        is_last_of_window = (index + 1) % run.accumulation == 0 or index + 1 == run.batches_per_epoch
        if is_last_of_window:
            run.updater.begin(update_seed(run.seed, position.update))
        losses.append(accumulate_gradient(run, sent, position.epoch, index, size, is_last_of_window))
        if not is_last_of_window:
            continue
        for loss in mean_over_processes(run.accelerator, losses):
            run.guard.add_loss(loss)
            run.observe_loss(loss)
        losses.clear()
        update_parameters(run)
        position = position.after_update(batches=index + 1)
        notify(run.observers, "after_update", position)
        if stop.poll() or position.update >= run.max_updates:
            break
    return position


def accumulate_gradient(run: TrainingRun, sent: Sent, epoch: int, index: int, window: int, synchronise: bool) -> Tensor:
    """Add one batch's share to the gradient, and return its loss.

    Processes exchange gradients with the last batch of a window only.
    """
    torch.manual_seed(batch_seed(run.seed, epoch, index, run.accelerator.process_index))  # dropout inside the networks
    run.trainable.on_batch_start()
    with contextlib.nullcontext() if synchronise else run.accelerator.no_sync(run.step):
        loss: Tensor = run.step(sent.arrive()).mean()
        run.guard.begin_batch(sent.batch, epoch, index, loss.detach())
        run.accelerator.backward(loss / window)
    return loss.detach()


def one_step(run: TrainingRun, batch: Batch) -> None:
    """Make one update of one batch, outside of the loop."""
    accumulate_gradient(run, run.send(batch), epoch=1, index=0, window=1, synchronise=True)
    update_parameters(run)


def mean_over_processes(accelerator: Any, losses: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the mean over all processes of each batch's loss (); shares are weighted such that it is the mean over the images.

    One exchange for all of them, which the device makes in its turn and nobody waits for.
    """
    if accelerator.num_processes == 1:
        return list(losses)
    mean: Tensor = accelerator.reduce(torch.stack(list(losses)), reduction="mean")
    return mean.unbind()


def update_parameters(run: TrainingRun) -> None:
    """Bring the update to its end, and step the schedule unless a float16 overflow made the update void."""
    was_made = run.updater.finish()
    run.guard.finish_update(was_made)
    if was_made:
        run.schedule.step()
    run.trainable.after_update()


def batch_seed(seed: int, epoch: int, index: int, process_index: int) -> int:
    """Return the 63-bit seed of what is drawn while a batch is trained on; it depends on the arguments alone."""
    return _mixed(
        seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB + process_index * 0xD6E8FEB86659FD93
    )


def update_seed(seed: int, update: int) -> int:
    """Return the 63-bit seed of what is drawn in an update of the parameters, the same in every process.

    Args:
        seed: of the run.
        update: updates made before it.
    """
    return _mixed(seed * 0x9E3779B97F4A7C15 + update * 0xA24BAED4963EE407 + 0x9FB21C651E98DF25)


def _mixed(value: int) -> int:
    """The last steps of splitmix64 (Steele et al. 2014), which spread every bit over the result."""
    mask = (1 << 64) - 1
    value &= mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> 1


def notify(observers: Sequence[Observer], event: str, position: Position) -> None:
    """Call `event` of every observer, in order."""
    for observer in observers:
        getattr(observer, event)(position)
