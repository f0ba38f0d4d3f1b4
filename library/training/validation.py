"""The loss on images that are never trained on, measured between updates without disturbing them.

The same images, noise and timesteps every time, nothing left to chance, summed over all processes: two values differ because the
weights do, and for no other reason.
"""

import contextlib
import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from library.dataset.batch import Batch
from library.options.groups.validation import ValidationOptions
from library.training.events import EventLog
from library.training.position import Position
from library.training.step import TrainStep
from library.training.trackers import RunLog
from library.training.trainable import Trainable, evaluation_mode

log = logging.getLogger(__name__)

NUM_TIMESTEPS = 4


@dataclass(frozen=True)
class ValidationPlan:
    """When the loss on held-out images is measured."""

    every_n_steps: int | None
    every_n_epochs: int

    @classmethod
    def of(cls, options: ValidationOptions) -> "ValidationPlan":
        """Read the plan from the options; epochs are always measured, each of them where nothing else is said."""
        return cls(options.validate_every_n_steps, options.validate_every_n_epochs or 1)

    def is_due_after_update(self, update: int) -> bool:
        """Tell whether the loss is measured after `update` updates."""
        return self.every_n_steps is not None and update % self.every_n_steps == 0

    def is_due_after_epoch(self, epoch: int) -> bool:
        """Tell whether the loss is measured after an epoch, counted from 1."""
        return epoch % self.every_n_epochs == 0


def validation_timesteps(low: int, high: int) -> list[int]:
    """Return the timesteps the loss is measured at: those that cut the range that is trained into five equal parts.

    Args:
        low: first timestep that is trained.
        high: the one after the last; the only one where the range is empty.
    """
    parts = NUM_TIMESTEPS + 1
    return [low + (high - low) * cut // parts for cut in range(1, parts)] if low < high else [high]


@dataclass(frozen=True)
class Measured:
    """What a measurement found."""

    totals: Sequence[tuple[float, int]]
    """Sum and number of losses of each dataset of the file."""

    @property
    def loss(self) -> float:
        """The mean over all images and timesteps; not a number where no image is held out."""
        return _mean(sum(total for total, _ in self.totals), sum(count for _, count in self.totals))

    def by_dataset(self) -> dict[int, float]:
        """Return the mean of each dataset that has images here, by its number from 1; empty where one dataset has them all."""
        found = {number: _mean(*each) for number, each in enumerate(self.totals, start=1) if each[1]}
        return found if len(found) > 1 else {}


def _mean(total: float, count: int) -> float:
    return total / count if count else float("nan")


@dataclass
class Validation:
    """The observer that measures the loss on held-out images.

    Args:
        plan: when.
        batches: gives this process's share of the held-out images, the same at every call.
        step: computes the loss; not wrapped for several processes, which would wait for each other in it.
        timesteps: measured at each of them.
        seed: decides the noise, for each image and timestep.
        accelerator: says where, and adds up over processes.
        trainable: put in evaluation mode while measuring.
        averaged: enters the evaluation mode of optimizers that train other weights than they hand out.
        training_loss: gives the running loss, which the validation loss is held against.
        trackers: receive the values.
        events: of the run.
        num_datasets: in the dataset file.
    """

    plan: ValidationPlan
    batches: Callable[[], Iterable[Batch]]
    step: TrainStep
    timesteps: Sequence[int]
    seed: int
    accelerator: Any
    trainable: Trainable
    averaged: Callable[[], AbstractContextManager[None]]
    training_loss: Callable[[], float]
    trackers: RunLog
    events: EventLog = field(default_factory=EventLog)
    num_datasets: int = 1

    def __post_init__(self) -> None:
        self._last: tuple[int, Measured] | None = None
        self._count = 0

    def before_training(self, position: Position) -> None:
        """Nothing is measured before the first step."""

    def after_update(self, position: Position) -> None:
        """Measure where the plan has a step."""
        if self.plan.is_due_after_update(position.update):
            values = self._values("step", position)
            self.trackers.step(values, position.update, position.epoch, val_step=self._count)

    def after_epoch(self, position: Position) -> None:
        """Measure where the plan has an epoch."""
        if self.plan.is_due_after_epoch(position.epoch):
            values = self._values("epoch", position)
            self.trackers.epoch(values, position.epoch, position.update, val_step=self._count)

    def after_training(self, position: Position) -> None:
        """Nothing is measured at the end that a step or an epoch did not measure."""

    def _values(self, kind: str, position: Position) -> dict[str, float]:
        if self._last is None or self._last[0] != position.update:
            self._last = position.update, self.measure()
            self._count += 1
        measured, training = self._last[1], self.training_loss()
        by_dataset = measured.by_dataset()
        if self.accelerator.is_main_process:
            each = "".join(f"; dataset {number}: {loss:.5g}" for number, loss in by_dataset.items())
            log.info("Validation loss %.5g at step %d (training %.5g%s)", measured.loss, position.update, training, each)
            self.events.write(
                "validation",
                step=position.update,
                epoch=position.epoch,
                loss=measured.loss,
                training=training,
                **({"datasets": by_dataset} if by_dataset else {}),
            )
        of_datasets = {f"loss/validation/dataset{number}/{kind}_average": loss for number, loss in by_dataset.items()}
        values = {f"loss/validation/{kind}_average": measured.loss, f"loss/validation/{kind}_divergence": measured.loss - training}
        return values | of_datasets

    def measure(self) -> Measured:
        """Measure the loss of all held-out images at all timesteps; nothing else is changed by it."""
        device = self.accelerator.device
        totals = torch.zeros(self.num_datasets, 2, dtype=torch.float64)
        sums: list[tuple[int, torch.Tensor]] = []
        with self._undisturbed():
            for batch in self.batches():
                losses = self._losses(batch.to(device))
                sums.append((batch.section, losses.float().sum()))
                totals[batch.section, 1] += losses.numel()
        if sums:
            for (section, _), value in zip(sums, torch.stack([value for _, value in sums]).cpu().double(), strict=True):
                totals[section, 0] += value
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals.to(device), reduction="sum").cpu()
        return Measured(tuple((total, int(count)) for total, count in totals.tolist()))

    def _losses(self, batch: Batch) -> torch.Tensor:
        posterior = [measuring_seed(self.seed, key, -1) for key in batch.image_keys]
        noise = [[measuring_seed(self.seed, key, timestep) for key in batch.image_keys] for timestep in self.timesteps]
        with self.accelerator.autocast():
            return self.step.losses_at(batch, self.timesteps, noise, posterior)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Leave weights, modes and random numbers of training as they were."""
        device = self.accelerator.device
        encoders = [encoder for encoder in self.step.parts.text_encoders if encoder is not None]
        numbers = random.getstate()
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
                stack.enter_context(self.averaged())
                stack.enter_context(self.trainable.evaluation())
                for module in (self.step.parts.denoiser, *encoders):
                    stack.enter_context(evaluation_mode(module))
                stack.enter_context(torch.no_grad())
                yield
        finally:
            random.setstate(numbers)


def measuring_seed(seed: int, image_key: str, timestep: int) -> int:
    """Return the seed of an image's noise at a timestep: 63 bits of a hash, so that neighbours share nothing.

    Args:
        seed: of the measurement.
        image_key: the image file.
        timestep: or -1, for the sample of the VAE's posterior.
    """
    text = f"{seed}\0{image_key}\0{timestep}\0validation"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") >> 1
