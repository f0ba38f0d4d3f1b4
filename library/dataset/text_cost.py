"""What caching varying captions costs, told once while it can still be stopped."""

import logging
import time
from collections.abc import Iterator

from library.dataset.dataset import Dataset
from library.models.family import TextCond
from library.options.groups.cache import CacheOptions

logger = logging.getLogger(__name__)


class TextCost:
    """Says how many texts captions become, how much room they take and how long they take to encode.

    Nothing is said where captions do not vary: then each is one text.

    Args:
        dataset: whose captions are encoded.
        options: number of variants, and memory or disk.
        batch_size: texts per call of the encoders.
        num_processes: that share the texts; 1 where each encodes all.
    """

    def __init__(self, dataset: Dataset, options: CacheOptions, batch_size: int, num_processes: int) -> None:
        rules = [subset.captions for section in dataset.config.sections for subset in section.subsets]
        self._varying = list(dict.fromkeys(name for each in rules for name in each.varying()))
        self._num_images = dataset.num_images
        self._variants = options.text_cache_variants
        self._where = "on disk" if options.cache_text_encoder_outputs_to_disk else "in memory"
        self._batch_size = batch_size
        self._num_processes = num_processes

    def watched(self, outputs: Iterator[tuple[str, TextCond]], missing: int, total: int) -> Iterator[tuple[str, TextCond]]:
        """Pass on outputs, and tell the cost when the first ones have shown it.

        Args:
            outputs: of texts that are encoded.
            missing: their number.
            total: number of texts with those that are in the cache already.
        """
        started, told = time.monotonic(), False
        size = 0
        for number, (text, cond) in enumerate(outputs):
            if number == 0:
                size = total * sum(value.nbytes for value in cond.values())
            if number == self._batch_size:
                started = time.monotonic()  # the first call also warms up
            if number == 2 * self._batch_size:
                self.tell(total, size, (time.monotonic() - started) / self._batch_size * missing)
                told = True
            yield text, cond
        if missing and not told:
            self.tell(total, size, None)

    def tell(self, total: int, size: int, seconds: float | None) -> None:
        """Log the cost of this process's texts, times the number of processes that share them."""
        if not self._varying:
            return
        takes = "" if seconds is None else f", and about {_duration(seconds)} to encode"
        logger.info(
            "Captions vary with %s: those of %d images become %d texts (--text_cache_variants %d), which take %s %s%s.",
            ", ".join(self._varying), self._num_images, total * self._num_processes, self._variants,
            _amount(size * self._num_processes), self._where, takes,
        )  # fmt: skip


def _amount(size: float) -> str:
    megabytes = size / 1e6
    return f"{megabytes / 1e3:.1f} GB" if megabytes >= 1e4 else f"{megabytes:.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{max(seconds, 1):.0f} s"
