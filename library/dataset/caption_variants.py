"""A caption that varies from use to use, as a bounded number of texts that can be encoded before training.

Each caption has variants with the numbers 0 to N - 1. A variant's text depends on the image's name, its caption, the subset's rules
and the number alone, not on the seed of the run: another seed, and the caching tool, find the same texts in the cache. Each use of
an image draws a number, so that a text which several numbers share comes up as often as without a cache. Dropout of whole captions
is drawn for each use as ever. The warm-up of tags has N stages of equal length with one text each.
"""

import random
import sys
from dataclasses import dataclass, replace

from library.dataset.captions import caption_for_use, is_dropped, warmed_up
from library.dataset.plan import variant_seed
from library.options.dataset_config import CaptionRules

_AFTER_WARMUP = sys.maxsize


@dataclass(frozen=True, slots=True)
class CaptionVariants:
    """The texts one image can have.

    Args:
        caption: the image's own.
        rules: the subset's caption settings.
        image: name of the image.
        count: variants, N.
    """

    caption: str
    rules: CaptionRules
    image: str
    count: int

    def texts(self) -> tuple[str, ...]:
        """Return every distinct text but the empty one of dropped captions: variants by number, then the warm-up's stages."""
        varying = self.rules.varying_text()
        numbers = range(self.count if varying else 1)
        stages = range(self.count if "token_warmup_step" in varying else 0)
        return tuple(dict.fromkeys([*map(self._variant, numbers), *map(self._stage, stages)]))

    def for_use(self, epoch: int, rng: random.Random, *, update: int = 0, total_updates: int = 0) -> str:
        """Return the text of one use; see `caption_for_use`, which this stands in for."""
        if is_dropped(self.rules, epoch, rng):
            return ""
        warmup = warmed_up(self.rules, update, total_updates)
        if warmup is not None:
            return self._stage(warmup[0] * self.count // warmup[1])
        return self._variant(rng.randrange(self.count) if self.count > 1 and self.rules.varying_text() else 0)

    def _variant(self, number: int) -> str:
        rules = replace(self.rules, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0)
        return caption_for_use(self.caption, rules, 1, self._generator(number), update=_AFTER_WARMUP)

    def _stage(self, number: int) -> str:
        rules = replace(self.rules, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0, token_warmup_step=self.count)
        return caption_for_use(self.caption, rules, 1, self._generator(number), update=number)

    def _generator(self, number: int) -> random.Random:
        return random.Random(variant_seed(self.image, number))
