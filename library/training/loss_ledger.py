"""The loss of every image, compared with that of the others at the same timesteps (`--loss_ledger`).

Most of what makes one loss larger than another is the timestep, not the image. So each loss is held against the mean of all
images' losses in the same part of the timesteps, and what is left tells of the image.
"""

import csv
import io
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.dataset.batch import Batch
from library.files.atomic import atomic_write_text
from library.options.errors import UserError
from library.training.async_scalars import AsyncScalars
from library.training.position import Position

log = logging.getLogger(__name__)

NUM_BINS = 20
"""Parts that the timesteps are cut into; losses are compared within one."""
NUM_TIMESTEPS = 1000
COLUMNS = ("image", "uses", "loss", "expected_loss", "relative_loss")
_MOST_TOLD = 10


@dataclass(frozen=True)
class ImageLoss:
    """What was seen of one image."""

    image: str
    uses: float
    loss: float
    """Sum over the uses."""
    expected: float
    """Sum of the mean losses of all images where this one was used."""

    @property
    def relative(self) -> float:
        """The loss in units of the expected one."""
        return self.loss / self.expected if self.expected else 1.0

    def __add__(self, other: "ImageLoss") -> "ImageLoss":
        return ImageLoss(self.image, self.uses + other.uses, self.loss + other.loss, self.expected + other.expected)


class LossTable:
    """Sums of losses: by image, and by image and part of the timesteps the number of uses."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.sums = np.zeros(0)
        self.uses = np.zeros((0, NUM_BINS), dtype=np.int64)
        self.bin_sums = np.zeros(NUM_BINS)

    def add(self, image: str, loss: float, timestep: float) -> None:
        """Count one use of an image; a loss that is not finite says nothing of the image."""
        if not np.isfinite(loss):
            return
        row, part = self._row(image), min(int(timestep * NUM_BINS / NUM_TIMESTEPS), NUM_BINS - 1)
        self.sums[row] += loss
        self.uses[row, part] += 1
        self.bin_sums[part] += loss

    def merge(self, other: "LossTable") -> None:
        """Add what another process saw."""
        rows = [self._row(image) for image in other.rows]
        self.sums[rows] += other.sums[: len(rows)]
        self.uses[rows] += other.uses[: len(rows)]
        self.bin_sums += other.bin_sums

    def images(self) -> list[ImageLoss]:
        """Return what was seen of every image."""
        per_bin = self.uses.sum(axis=0)
        expected = self.uses @ (self.bin_sums / np.maximum(per_bin, 1))
        uses = self.uses.sum(axis=1)
        return [
            ImageLoss(image, uses.item(row), self.sums.item(row), expected.item(row))
            for image, row in self.rows.items()
            if uses[row]
        ]

    def _row(self, image: str) -> int:
        row = self.rows.setdefault(image, len(self.rows))
        if row >= len(self.sums):
            more = max(64, len(self.sums))
            self.sums = np.concatenate([self.sums, np.zeros(more)])
            self.uses = np.concatenate([self.uses, np.zeros((more, NUM_BINS), dtype=np.int64)])
        return row


class LossLedger:
    """The observer that keeps the ledger, in every process, and writes it, in the main one.

    Written after every epoch and at the end; where a run is stopped in between, with what the main process knows then.

    Args:
        path: of the CSV.
        gather: gives every process what each hands in (`accelerate.utils.gather_object`).
        writes: whether this is the process that writes.
        continues: whether the file is that of a run that is continued.
    """

    def __init__(self, path: Path, gather: Callable[[list[LossTable]], list[LossTable]], *, writes: bool, continues: bool) -> None:
        self.table = LossTable()
        self._path = path
        self._gather = gather
        self._writes = writes
        self._before = {each.image: each for each in read_ledger(path)} if writes and continues else {}
        self._others: list[LossTable] = []
        self._feed = AsyncScalars()

    def observe(self, batch: Batch, timesteps: Tensor, losses: Tensor) -> None:
        """Take the losses of a batch, wherever they are.

        Args:
            batch: whose images they are of; its weights are taken out of the losses again.
            timesteps: (B,), at which they were measured.
            losses: (B,).
        """
        self._feed.push(list(batch.image_keys), torch.stack([losses.detach() / batch.loss_weights, timesteps.to(losses.dtype)]))

    def before_training(self, position: Position) -> None:
        """Nothing has been seen yet."""

    def after_update(self, position: Position) -> None:
        """Count what has arrived."""
        self._count(self._feed.ready())

    def after_epoch(self, position: Position) -> None:
        """Put together what all processes saw, and write it."""
        self._collect()
        self.write()

    def after_training(self, position: Position) -> None:
        """Write the last time and tell which images stand out."""
        self._collect()
        self.write()
        if self._writes:
            log.info("%s", outliers_sentence(self.images(), self._path))

    def stopped(self) -> None:
        """Write what this process knows; nobody waits for the others when a run is stopped."""
        self._count(self._feed.drain())
        self.write()

    def images(self) -> list[ImageLoss]:
        """Return all images, those with the highest relative loss first, with what runs before this one saw."""
        whole = LossTable()
        for table in (self.table, *self._others):
            whole.merge(table)
        seen = {each.image: each for each in whole.images()}
        for image, before in self._before.items():
            seen[image] = before + seen[image] if image in seen else before
        return sorted(seen.values(), key=lambda each: each.relative, reverse=True)

    def write(self) -> None:
        """Write the file."""
        if not self._writes:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for each in self.images():
            mean, expected = each.loss / each.uses, each.expected / each.uses
            writer.writerow([each.image, int(each.uses), f"{mean:.6g}", f"{expected:.6g}", f"{each.relative:.4g}"])
        try:
            atomic_write_text(self._path, text.getvalue())
        except (OSError, UserError) as error:  # no reason to lose a run
            log.warning("%s could not be written (%s); training goes on.", self._path, error)

    def _collect(self) -> None:
        self._count(self._feed.drain())
        tables = self._gather([self.table])
        if self._writes:
            self._others = tables[1:]  # the main process is the first

    def _count(self, arrived: Any) -> None:
        for images, (losses, timesteps) in arrived:
            for image, loss, timestep in zip(images, losses, timesteps, strict=True):
                self.table.add(image, loss, timestep)


def read_ledger(path: Path) -> list[ImageLoss]:
    """Read what an earlier run wrote; nothing where there is no such file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [
            ImageLoss(row["image"], uses, float(row["loss"]) * uses, float(row["expected_loss"]) * uses)
            for row in rows
            for uses in [float(row["uses"])]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def outliers(images: Sequence[ImageLoss]) -> list[ImageLoss]:
    """Return the images that stand out, highest relative loss first.

    Those are more than three deviations above the median, the deviation being 1.4826 times the median distance from it, which for
    normal values is their standard deviation and does not mind outliers. Images seen less than half as often as most are left out.
    """
    if not images:
        return []
    often = statistics.median(each.uses for each in images) / 2
    values = [each.relative for each in images if each.uses >= often]
    middle = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in values)
    found = [each for each in images if each.uses >= often and each.relative > middle + 3 * deviation + 1e-6]
    return sorted(found, key=lambda each: each.relative, reverse=True)


def outliers_sentence(images: Sequence[ImageLoss], path: Path) -> str:
    """Say which images stand out, for the log."""
    found = outliers(images)
    if not found:
        return f"No image has a loss that stands out. All of them are in {path}."
    lines = [f"  {each.relative:.2f} × in {each.uses:.0f} uses: {each.image}" for each in found[:_MOST_TOLD]]
    more = [f"  and {len(found) - _MOST_TOLD} more"] if len(found) > _MOST_TOLD else []
    head = f"Images whose loss stands out among those at the same timesteps (look at picture and caption; all are in {path}):"
    return "\n".join([head, *lines, *more])
