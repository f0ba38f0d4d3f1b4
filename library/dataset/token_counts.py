"""How long captions are for the text encoders, at the speed of looking words up."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from library.dataset.captions import caption_for_use
from library.dataset.index import Section
from library.models.prompt_weights import without_weights
from library.options.dataset_config import CaptionRules

CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""Texts to their numbers of tokens, uncut and without begin and end: `Family.count_tokens`."""

_PLAIN = re.compile(r"[\t\n\r -%'-~]*")  # ASCII without control characters and `&`, which begins an HTML entity
_PLAIN_RULES = CaptionRules()
_WITHOUT_EFFECT: dict[str, Any] = {  # what changes nothing of a caption where nothing else does
    name: getattr(_PLAIN_RULES, name) for name in ("caption_separator", "keep_tokens", "caption_dropout_rate", "token_warmup_min")
}
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
        words = caption.split()
        try:
            total = sum(map(self._words.__getitem__, words))
        except KeyError:
            total = self._with_new_words(words)
        needs_no_repair = _PLAIN.fullmatch(caption) is not None
        return total if total <= self.limit or needs_no_repair else int(self._count([caption])[0])

    def _with_new_words(self, words: Sequence[str]) -> int:
        new = [word for word in dict.fromkeys(words) if word not in self._words]
        counts = dict(zip(new, self._count(new), strict=True))
        self._words.update({word: count for word, count in counts.items() if len(word) <= _LONGEST_KEPT})
        return sum(counts[word] if word in counts else self._words[word] for word in words)


def longest_captions(section: Section) -> Iterator[tuple[str, str]]:
    """Yield the own text of each item, and the longest caption it can have: no tag is missing, each choice falls on the longest."""
    subsets = section.config.subsets
    leaves_text = [replace(subset.captions, **_WITHOUT_EFFECT) == _PLAIN_RULES for subset in subsets]
    for subset, text in zip(section.items.subsets.tolist(), section.items.captions(), strict=True):
        if leaves_text[subset] and "\n" not in text:
            yield text, text
        else:
            yield text, caption_for_use(text, subsets[subset].captions, epoch=1, rng=_LONGEST, update=_ALL_TAGS)


class _LongestChoice(random.Random):
    """Chance that drops nothing, moves nothing and always takes the longest."""

    def random(self) -> float:
        return 1.0 - 2.0**-53  # below 1, so that what happens with certainty still does

    def choice(self, seq: Any) -> Any:
        return max(seq, key=len)

    def shuffle(self, x: Any) -> None:
        """Leave the order."""


_LONGEST = _LongestChoice(0)
