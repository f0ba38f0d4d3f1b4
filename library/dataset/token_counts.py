"""How long captions are for the text encoders, at the speed of looking words up."""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from library.dataset.captions import caption_for_use
from library.models.prompt_weights import without_weights
from library.options.dataset_config import CaptionRules

CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""Texts to their numbers of tokens, uncut and without begin and end: `Family.count_tokens`."""

_WORDS = re.compile(r"\S+")
_PLAIN = re.compile(r"[\t\n\r -%'-~]*")  # ASCII without control characters and `&`, which begins an HTML entity
_LONGEST_KEPT = 40
_ALL_TAGS = 2**62  # an update at which any warm-up of tags is over


class TokenCounter:
    """Counts the tokens of many captions.

    Tokens never reach across a space, so that a caption has as many as its words have, and a collection has few words. Only where
    that sum is beyond the limit is the caption itself counted, since the tokenizer repairs broken text as a whole.

    Args:
        count: the family's tokenizer.
        limit: tokens that the text encoders read.
        weighted: whether brackets are weights, which are no tokens.
    """

    def __init__(self, count: CountTokens, limit: int, *, weighted: bool = False) -> None:
        self.limit = limit
        self._weighted = weighted
        self._count = count
        self._words: dict[str, int] = {}

    def tokens(self, caption: str) -> int:
        """Return the number of tokens of a caption."""
        if self._weighted:
            caption = without_weights(caption)
        words = _WORDS.findall(caption)
        known = self._words
        missing = [word for word in dict.fromkeys(words) if word not in known]
        counts = dict(zip(missing, self._count(missing), strict=True)) if missing else {}
        known.update({word: count for word, count in counts.items() if len(word) <= _LONGEST_KEPT})
        total = sum(counts[word] if word in counts else known[word] for word in words)
        needs_no_repair = _PLAIN.fullmatch(caption) is not None
        return total if total <= self.limit or needs_no_repair else int(self._count([caption])[0])


def longest_caption(text: str, rules: CaptionRules) -> str:
    """Return the longest caption an image can have in any use: no tag is missing, and every choice falls on the longest part."""
    return caption_for_use(text, rules, epoch=1, rng=_LONGEST, update=_ALL_TAGS)


class _LongestChoice(random.Random):
    """Chance that drops nothing, moves nothing and always takes the longest."""

    def random(self) -> float:
        return 1.0 - 2.0**-53  # below 1, so that what happens with certainty still does

    def choice(self, seq: Any) -> Any:
        return max(seq, key=len)

    def shuffle(self, x: Any) -> None:
        """Leave the order."""


_LONGEST = _LongestChoice(0)
