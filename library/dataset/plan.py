"""Which images are trained on together, in which order, and with which random draws: a function of (seed, epoch) alone."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from library.dataset.columns import Ints


@dataclass(frozen=True, slots=True)
class Share:
    """What one process gets of a global batch."""

    uses: tuple[int, ...]
    """Registered uses of images; never empty."""
    weight: float
    """Loss weight of each image before its own: makes the mean over processes of their mean losses the mean over the global batch;
    0 for the filler of a process left without an image."""


class Batches(Sequence[tuple[int, ...]]):
    """The batches of an epoch.

    Args:
        uses: of all batches, one after the other.
        starts: where each batch begins, and where the last one ends.
    """

    def __init__(self, uses: Ints, starts: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
        self._uses = uses
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[int, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | Sequence[tuple[int, ...]]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        return tuple(self._uses[self._starts[position] : self._starts[position + 1]].tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Batches):
            return NotImplemented
        return np.array_equal(self._uses, other._uses) and np.array_equal(self._starts, other._starts)

    def __hash__(self) -> int:
        return hash((self._uses.tobytes(), self._starts.tobytes()))


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one epoch, over all processes."""

    epoch: int
    batches: Sequence[tuple[int, ...]]
    """Uses of images, of one dataset and one bucket each; up to batch size times processes."""

    def share(self, batch: int, process_index: int, num_processes: int) -> Share:
        """Return what process `process_index` trains on in batch number `batch`; shares differ by one image at most."""
        uses = self.batches[batch]
        quotient, rest = divmod(len(uses), num_processes)
        start = process_index * quotient + min(process_index, rest)
        own = uses[start : start + quotient + (process_index < rest)]
        if not own:
            return Share(uses[:1], 0.0)
        return Share(own, num_processes * len(own) / len(uses))


def plan_epoch(groups: Sequence[Sequence[int] | Ints], sizes: Sequence[int], seed: int, epoch: int) -> EpochPlan:
    """Shuffle each group, cut it into batches, and shuffle the batches. Every use occurs exactly once.

    Args:
        groups: uses that may share a batch: those of one bucket of one dataset.
        sizes: images in a global batch, for each group.
        seed: of the run.
        epoch: counted from 1.
    """
    numbers = np.random.Philox(key=draw_seed(seed, epoch, -1))
    shuffled = [np.asarray(group, dtype=np.int32)[_order(numbers, len(group))] for group in groups]
    lengths = [_batch_lengths(len(group), size) for group, size in zip(groups, sizes, strict=True)]
    uses, counts = np.concatenate(shuffled), np.concatenate(lengths)
    starts = np.cumsum(counts) - counts
    order = _order(numbers, len(counts))
    ends = np.cumsum(counts[order])
    # Where each use goes: the new start of its batch, plus its place in it.
    sources = np.arange(len(uses)) + np.repeat(starts[order] - (ends - counts[order]), counts[order])
    return EpochPlan(epoch, Batches(uses[sources], np.concatenate([[0], ends])))


def _order(numbers: np.random.Philox, count: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Draw a permutation: raw bits are the same in every version of numpy, its own shuffles need not be."""
    return np.argsort(numbers.random_raw(count), kind="stable")


def _batch_lengths(count: int, size: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    lengths = np.full(-(-count // size), size, dtype=np.int64)
    if count % size:
        lengths[-1] = count % size
    return lengths


def draw_seed(seed: int, epoch: int, use: int) -> int:
    """Return the seed of every random draw for one use of an image: 63 bits of a BLAKE2b hash, so that neighbours share nothing."""
    digest = hashlib.blake2b(struct.pack("<qqq", _as_int64(seed), epoch, use), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def posterior_seed(seed: int, image_key: str, *, flipped: bool) -> int:
    """Return the seed of the posterior noise of a cached image, whatever its place in the dataset."""
    text = f"{seed}\0{image_key}\0{'flipped' if flipped else 'upright'}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") >> 1


def variant_seed(image: str, number: int) -> int:
    """Return the seed of a numbered variant of an image's caption, the same in every run."""
    return int.from_bytes(hashlib.blake2b(f"{number}\0{image}".encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _as_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
