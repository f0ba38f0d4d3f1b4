"""What holds of captions whatever the text, the rules and the draws."""

import random
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from library.dataset.captions import caption_for_use, replace_wildcards, settled_caption
from library.options.dataset_config import CaptionRules

TAG = st.text("abcxyz _()é語", min_size=1, max_size=6).filter(lambda text: text.strip() == text)
TAGS = st.lists(TAG, max_size=8)
SEEDS = st.integers(0, 2**32)
RATE = st.sampled_from([0.0, 0.3, 1.0])
TAG_RULES = st.builds(
    CaptionRules,
    shuffle_caption=st.booleans(),
    keep_tokens=st.integers(0, 4),
    caption_tag_dropout_rate=RATE,
    token_warmup_min=st.integers(0, 4),
    token_warmup_step=st.sampled_from([0.0, 0.5, 4.0]),
)
TEXT = st.text("ab,;|{}\n \\:é", max_size=30)
ANY_RULES = st.builds(
    CaptionRules,
    shuffle_caption=st.booleans(),
    caption_separator=st.sampled_from([",", ";", ", ", "|"]),
    keep_tokens=st.integers(0, 3),
    keep_tokens_separator=st.sampled_from(["", "||", "|"]),
    secondary_separator=st.sampled_from([None, ";", "::"]),
    enable_wildcard=st.booleans(),
    caption_prefix=st.sampled_from([None, "", "P", "{p|q} ||"]),
    caption_suffix=st.sampled_from([None, "", "S", "|| s, t"]),
    caption_dropout_rate=RATE,
    caption_dropout_every_n_epochs=st.integers(0, 2),
    caption_tag_dropout_rate=RATE,
    token_warmup_min=st.integers(0, 3),
    token_warmup_step=st.sampled_from([0.0, 0.5, 3.0]),
)


def use(text: str, rules: CaptionRules, seed: int = 0, epoch: int = 1, update: int = 0) -> str:
    return caption_for_use(text, rules, epoch, random.Random(seed), update=update, total_updates=8)


def tags_of(caption: str) -> list[str]:
    return caption.split(", ") if caption else []


@given(TAGS, TAG_RULES, SEEDS, st.integers(0, 5))
def test_tags_that_are_used_are_tags_of_the_caption_each_at_most_once_and_kept_ones_come_first(
    tags: list[str], rules: CaptionRules, seed: int, update: int
) -> None:
    used = tags_of(use(", ".join(tags), rules, seed, update=update))
    assert not Counter(used) - Counter(tags)
    assert used[: rules.keep_tokens] == tags[: rules.keep_tokens]
    if not rules.shuffle_caption:
        rest = iter(tags)
        assert all(tag in rest for tag in used)  # in the order they stand in the caption


@given(TAGS, TAG_RULES, SEEDS)
def test_without_dropout_and_warm_up_every_tag_is_used(tags: list[str], rules: CaptionRules, seed: int) -> None:
    used = use(", ".join(tags), replace(rules, caption_tag_dropout_rate=0.0, token_warmup_step=0.0), seed)
    assert Counter(tags_of(used)) == Counter(tags)


@given(TAGS, TAG_RULES, SEEDS)
def test_a_tag_dropout_of_one_leaves_what_is_kept(tags: list[str], rules: CaptionRules, seed: int) -> None:
    assert tags_of(use(", ".join(tags), replace(rules, caption_tag_dropout_rate=1.0), seed)) == tags[: rules.keep_tokens]


@given(TAGS, TAGS, TAGS, TAG_RULES, SEEDS, st.integers(0, 5))
def test_the_separator_keeps_what_stands_before_its_first_and_after_its_second_occurrence(
    front: list[str], middle: list[str], end: list[str], rules: CaptionRules, seed: int, update: int
) -> None:
    text = " ||| ".join(", ".join(part) for part in (front, middle, end))
    used = tags_of(use(text, replace(rules, keep_tokens_separator="|||"), seed, update=update))
    assert used[: len(front)] == front
    assert used[len(used) - len(end) :] == end
    flexible = used[len(front) : len(used) - len(end)]
    assert not Counter(flexible) - Counter(middle)


@given(TAGS, TAG_RULES, SEEDS, st.integers(0, 9))
def test_the_warm_up_takes_the_leading_tags_and_never_fewer_later(
    tags: list[str], rules: CaptionRules, seed: int, update: int
) -> None:
    rules = replace(rules, caption_tag_dropout_rate=0.0)
    now, later = (tags_of(use(", ".join(tags), rules, seed, update=number)) for number in (update, update + 1))
    assert Counter(now) == Counter(tags[: len(now)])
    assert len(now) <= len(later)
    assert len(now) >= min(rules.keep_tokens + rules.token_warmup_min, len(tags))


@given(TEXT, ANY_RULES, SEEDS, st.integers(1, 5))
def test_a_dropout_of_one_and_of_every_epoch_always_drops(text: str, rules: CaptionRules, seed: int, epoch: int) -> None:
    assert use(text, replace(rules, caption_dropout_rate=1.0), seed, epoch) == ""
    assert use(text, replace(rules, caption_dropout_every_n_epochs=1), seed, epoch) == ""


@given(TEXT, ANY_RULES, SEEDS, st.integers(1, 5), st.integers(0, 5))
def test_the_same_draws_give_the_same_caption_and_none_has_a_line_break(
    text: str, rules: CaptionRules, seed: int, epoch: int, update: int
) -> None:
    caption = use(text, rules, seed, epoch, update)
    assert caption == use(text, rules, seed, epoch, update)
    assert "\n" not in caption


@given(TEXT, ANY_RULES, SEEDS, st.integers(1, 5))
def test_rules_that_do_not_vary_draw_nothing_and_give_the_settled_caption(
    text: str, rules: CaptionRules, seed: int, epoch: int
) -> None:
    off = {name: type(getattr(rules, name))() for name in rules.varying()}
    fixed = replace(rules, **off)
    assert fixed.varying() == []
    generator = random.Random(seed)
    before = generator.getstate()
    assert caption_for_use(text, fixed, epoch, generator, update=epoch) == settled_caption(text, fixed)
    assert generator.getstate() == before


@given(TEXT, st.sampled_from(["", "||"]), SEEDS)
def test_a_settled_caption_stays_as_it_is(text: str, mark: str, seed: int) -> None:
    rules = CaptionRules(keep_tokens_separator=mark)
    once = use(text, rules, seed)
    if not (mark and mark in once):  # a third mark is left in the caption
        assert use(once, rules, seed) == once


@given(st.lists(st.text("ab c", max_size=4), min_size=1, max_size=5), st.text("xy z", max_size=5), SEEDS)
def test_a_wildcard_becomes_one_of_its_parts_and_what_surrounds_it_stays(parts: list[str], around: str, seed: int) -> None:
    caption = use(f"{around}{{{'|'.join(parts)}}}{around}", CaptionRules(enable_wildcard=True), seed)
    if parts == [""]:
        assert caption == f"{around}{{}}{around}"
    else:
        assert caption in {f"{around}{part}{around}" for part in parts}


@settings(max_examples=20)
@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4, unique=True))
def test_every_part_and_every_line_comes_up(parts: list[str]) -> None:
    rules = CaptionRules(enable_wildcard=True)
    assert {use("{" + "|".join(parts) + "}", rules, seed) for seed in range(200)} == set(parts)
    assert {use("\n".join(parts), rules, seed) for seed in range(200)} == set(parts)


@given(st.text("ab{} ", max_size=20), SEEDS)
def test_doubled_braces_are_braces(text: str, seed: int) -> None:
    doubled = text.replace("{", "{{").replace("}", "}}")
    assert replace_wildcards(doubled, random.Random(seed)) == text


@given(TAGS, st.sampled_from([";", "|", " + "]))
def test_whatever_separates_tags_a_comma_and_a_blank_join_them(tags: list[str], separator: str) -> None:
    rules = CaptionRules(caption_separator=separator, shuffle_caption=True, keep_tokens=len(tags))
    assert use(separator.join(tags), rules) == ", ".join(tags)
