"""How long captions are for the text encoders, at the speed of looking words up."""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
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
_GROUP = 4096
_MOST_WORDS = 500_000  # of languages without spaces, every caption is a word of its own
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

    def count(self, captions: Iterable[str]) -> Iterator[int]:
        """Yield the number of tokens of each caption; words that are new go to the tokenizer in large groups."""
        waiting = iter(captions)
        while group := list(islice(waiting, _GROUP)):
            texts = [without_weights(caption) for caption in group] if self._weighted else group
            words = [text.split() for text in texts]
            self._learn(words)
            known = self._words.__getitem__
            yield from (self._tokens(text, sum(map(known, own))) for text, own in zip(texts, words, strict=True))

    def _tokens(self, caption: str, total: int) -> int:
        """Return the tokens of a caption whose words have so many."""
        needs_no_repair = total <= self.limit or _PLAIN.fullmatch(caption) is not None
        return total if needs_no_repair else int(self._count([caption])[0])

    def _learn(self, captions: Sequence[Sequence[str]]) -> None:
        if len(self._words) > _MOST_WORDS:
            self._words.clear()
        new = [word for word in dict.fromkeys(chain.from_iterable(captions)) if word not in self._words]
        self._words.update(zip(new, self._count(new), strict=True))


def longest_captions(section: Section) -> Iterator[str]:
    """Yield the longest caption each item can have in any use: no tag is missing, and every choice falls on the longest part."""
    subsets = section.config.subsets
    leaves_text = [replace(subset.captions, **_WITHOUT_EFFECT) == _PLAIN_RULES for subset in subsets]
    for subset, text in zip(section.items.subsets.tolist(), section.items.captions(), strict=True):
        if leaves_text[subset] and "\n" not in text:
            yield text
        else:
            yield caption_for_use(text, subsets[subset].captions, epoch=1, rng=_LONGEST, update=_ALL_TAGS)


class _LongestChoice(random.Random):
    """Chance that drops nothing, moves nothing and always takes the longest."""

    def random(self) -> float:
        return 1.0 - 2.0**-53  # below 1, so that what happens with certainty still does

    def choice(self, seq: Any) -> Any:
        return max(seq, key=len)

    def shuffle(self, x: Any) -> None:
        """Leave the order."""


_LONGEST = _LongestChoice(0)
