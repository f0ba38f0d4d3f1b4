"""Which images are trained on together, in which order, and with which random draws: a function of (seed, epoch) alone."""

import hashlib
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """What one process gets of a global batch."""

    uses: tuple[int, ...]
    """Registered uses of images; never empty."""
    weight: float
    """Loss weight of each image before its own: makes the mean over processes of their mean losses the mean over the global batch;
    0 for the filler of a process left without an image."""


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one epoch, over all processes."""

    epoch: int
    batches: tuple[tuple[int, ...], ...]
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


def plan_epoch(groups: Sequence[Sequence[int]], sizes: Sequence[int], seed: int, epoch: int) -> EpochPlan:
    """Shuffle each group, cut it into batches, and shuffle the batches. Every use occurs exactly once.

    Args:
        groups: uses that may share a batch: those of one bucket of one dataset.
        sizes: images in a global batch, for each group.
        seed: of the run.
        epoch: counted from 1.
    """
    rng = random.Random(draw_seed(seed, epoch, -1))
    batches: list[tuple[int, ...]] = []
    for group, size in zip(groups, sizes, strict=True):
        order = list(group)
        rng.shuffle(order)
        batches += [tuple(order[start : start + size]) for start in range(0, len(order), size)]
    rng.shuffle(batches)
    return EpochPlan(epoch, tuple(batches))


def draw_seed(seed: int, epoch: int, use: int) -> int:
    """Return the seed of every random draw for one use of an image: 63 bits of a BLAKE2b hash, so that neighbours share nothing."""
    digest = hashlib.blake2b(struct.pack("<qqq", _as_int64(seed), epoch, use), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def posterior_seed(seed: int, image_key: str, *, flipped: bool) -> int:
    """Return the seed of the posterior noise of a cached image, whatever its place in the dataset."""
    text = f"{seed}\0{image_key}\0{'flipped' if flipped else 'upright'}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") >> 1


def _as_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
