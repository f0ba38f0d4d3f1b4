"""Counting words instead of captions gives the tokenizer's own numbers."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.dataset.token_counts import TokenCounter
from library.models.sdxl.tokenizer import load_bpe


def exact(texts: Sequence[str]) -> list[int]:
    return [len(load_bpe().encode(text)) for text in texts]


@pytest.mark.parametrize(
    "caption", ["", "1girl, long hair, ^_^", "a\nb\t c", "don't {stop|go} (now:1.2)", "Käfer “quoted” ﬁn", "猫と犬 🐱"]
)
def test_a_caption_has_the_tokens_of_its_words(caption: str) -> None:
    assert next(TokenCounter(exact, 75).count([caption])) == exact([caption])[0]


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="&"), max_size=80))
def test_ascii_captions_are_counted_exactly_by_their_words(caption: str) -> None:
    assert next(TokenCounter(exact, 5).count([caption])) == exact([caption])[0]


@given(st.text(max_size=60))
def test_whatever_is_beyond_the_limit_is_counted_as_it_is(caption: str) -> None:
    tokens = next(TokenCounter(exact, 3).count([caption]))
    assert tokens <= 3 or tokens == exact([caption])[0]


def test_each_word_is_given_to_the_tokenizer_once() -> None:
    asked: list[str] = []

    def count(texts: Sequence[str]) -> list[int]:
        asked.extend(texts)
        return [1] * len(texts)

    counter = TokenCounter(count, 75)
    assert list(counter.count(["red cat", "red dog", "cat red"])) == [2, 2, 2]
    assert asked == ["red", "cat", "dog"]


def test_the_brackets_of_weights_are_no_tokens() -> None:
    caption = "(a red cat:1.2) and [one ((blue)) dog]"
    assert next(TokenCounter(exact, 75, weighted=True).count([caption])) == exact(["a red cat and one blue dog"])[0] == 7
    assert next(TokenCounter(exact, 75).count([caption])) == exact([caption])[0] > 7
