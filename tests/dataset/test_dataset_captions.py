"""Captions against values computed with sd-scripts, whose random draws come in the same order."""

import random
from pathlib import Path
from typing import Any

import pytest

from library.dataset.caption_files import caption_of_text, caption_text, find_caption_file, likely_extension
from library.dataset.captions import caption_for_use
from library.options.dataset_config import CaptionRules
from library.options.errors import UserError

LETTERS = "a, b, c, d, e"
SHUFFLE = {"shuffle_caption": True}
MARK = {"shuffle_caption": True, "keep_tokens_separator": "|||"}


def caption(text: str, seed: int = 0, epoch: int = 1, update: int = 0, total_updates: int = 0, **rules: Any) -> str:
    return caption_for_use(text, CaptionRules(**rules), epoch, random.Random(seed), update=update, total_updates=total_updates)


@pytest.mark.parametrize(
    ("rules", "text", "seed", "expected"),
    [
        ({"caption_prefix": "P", "caption_suffix": "S"}, "a, b", 0, "P a, b S"),
        ({"caption_prefix": "P", "caption_suffix": "S"}, "", 0, "P  S"),
        ({"keep_tokens_separator": "|||"}, "a , b", 0, "a , b"),
        (MARK, "a, b ||| c,, d , ||| e,", 0, "a, b, c, d, e"),
        (MARK, "a ||| b, c ||| d ||| e", 0, "a, b, c, d ||| e"),
        (SHUFFLE | {"caption_separator": ";"}, "a;b;c", 0, "a, c, b"),
        (SHUFFLE, "a, b,, c", 0, ", a, b, c"),
        (SHUFFLE, LETTERS, 0, "c, b, a, e, d"),
        (SHUFFLE, LETTERS, 1, "c, d, e, a, b"),
        (SHUFFLE, LETTERS, 2, "c, b, d, e, a"),
        (SHUFFLE | {"keep_tokens": 2}, LETTERS, 0, "a, b, c, e, d"),
        (SHUFFLE | {"keep_tokens": 2}, LETTERS, 1, "a, b, d, e, c"),
        ({"caption_tag_dropout_rate": 0.5}, LETTERS, 0, "a, b, e"),
        ({"caption_tag_dropout_rate": 0.5}, LETTERS, 1, "b, c"),
        (SHUFFLE | {"caption_tag_dropout_rate": 0.5}, LETTERS, 0, "c, a, e, d"),
        (SHUFFLE | {"caption_tag_dropout_rate": 0.5}, LETTERS, 1, "e, a"),
        ({"caption_tag_dropout_rate": 1.0, "keep_tokens": 1}, "a, b, c", 0, "a"),
        ({"secondary_separator": ";;;"}, "a, b;;;c;;;d, e", 0, "a, b,c,d, e"),
        ({"enable_wildcard": True}, "{x|y|z} and {1|2}", 0, "y and 2"),
        ({"enable_wildcard": True}, "{x|y|z} and {1|2}", 1, "x and 1"),
        ({"enable_wildcard": True}, "x {} {|} y", 0, "x {}  y"),
        ({"enable_wildcard": True}, "l1\nl2\nl3", 0, "l2"),
        ({"enable_wildcard": True}, "l1\nl2\nl3", 1, "l1"),
        ({"caption_dropout_rate": 0.5}, "a, b", 0, "a, b"),
        ({"caption_dropout_rate": 0.5}, "a, b", 1, ""),
        ({"caption_dropout_rate": 0.5}, "a, b", 2, "a, b"),
        ({"caption_dropout_rate": 0.5}, "a, b", 3, ""),
        (MARK | {"caption_prefix": "trig, t2 |||", "caption_suffix": ", s0 ||| best, good"}, "x, y, z", 0,
         "trig, t2, z, x, y, s0, best, good"),
    ],
)  # fmt: skip
def test_captions_equal_the_reference(rules: dict[str, Any], text: str, seed: int, expected: str) -> None:
    assert caption(text, seed, **rules) == expected


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("{a|b} x {{lit}} {c}", {"a x {lit} c", "b x {lit} c"}),
        ("{a|{b|c}} z", {"{a|{b|c} z"}),
        ("{2::a|b}", {"2::a", "b"}),
    ],
)
def test_wildcards_know_escapes_but_no_nesting_and_no_weights(text: str, choices: set[str]) -> None:
    assert {caption(text, seed, enable_wildcard=True) for seed in range(20)} == choices


@pytest.mark.parametrize(
    ("rules", "text", "expected"),
    [
        ({}, "a ||| b ||| c", "a, b, c"),
        ({}, "1girl, dress ||| red,  blue", "1girl, dress, red, blue"),
        ({}, "a ||| b ||| c ||| d", "a, b, c ||| d"),
        ({"keep_tokens": 1}, "a, b", "a, b"),
        ({"caption_separator": ";"}, "a; b ||| c", "a, b, c"),
        ({"caption_prefix": "trig |||"}, "a  photo of x", "trig, a  photo of x"),
        ({"enable_wildcard": True}, "{a} |||\n{a} |||", "a"),
        ({"secondary_separator": ";;"}, "a ||| b;;c", "a, b,c"),
    ],
)
def test_the_keep_tokens_separator_is_never_trained(rules: dict[str, Any], text: str, expected: str) -> None:
    assert caption(text, keep_tokens_separator="|||", **rules) == expected


def test_prefix_and_suffix_belong_to_whichever_line_is_chosen() -> None:
    rules = {"enable_wildcard": True, "caption_prefix": "P", "caption_suffix": "S"}
    assert {caption("l1\nl2", seed, **rules) for seed in range(20)} == {"P l1 S", "P l2 S"}


def test_without_wildcards_only_the_first_line_counts() -> None:
    assert caption("l1\nl2", caption_prefix="P", caption_suffix="S") == "P l1 S"


@pytest.mark.parametrize(("every", "dropped"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3])])
def test_captions_are_dropped_in_every_nth_epoch(every: int, dropped: list[int]) -> None:
    assert [epoch for epoch in range(1, 5) if caption("a", epoch=epoch, caption_dropout_every_n_epochs=every) == ""] == dropped


@pytest.mark.parametrize(
    ("minimum", "step", "total", "counts"),
    [
        (1, 10, 0, {0: 1, 1: 1, 3: 2, 5: 3, 9: 4, 10: 5, 99: 5}),
        (2, 0.5, 20, {0: 2, 2: 2, 5: 3, 9: 4, 10: 5}),
        (2, 0.5, 0, {0: 5, 9: 5}),
        (0, 10, 0, {0: 0, 5: 2}),
        (7, 10, 0, {0: 5, 9: 5}),
        (1, 1, 0, {0: 1, 1: 5}),
    ],
)
def test_the_tag_warm_up_uses_more_leading_tags_with_every_update(
    minimum: int, step: float, total: int, counts: dict[int, int]
) -> None:
    rules = {"token_warmup_min": minimum, "token_warmup_step": step}
    for update, count in counts.items():
        used = caption(LETTERS, update=update, total_updates=total, **rules)
        assert used == ", ".join(LETTERS.split(", ")[:count])


def test_a_warm_up_that_starts_above_the_number_of_tags_uses_all_of_them() -> None:
    assert {caption("a, b", update=update, token_warmup_min=5, token_warmup_step=10) for update in range(12)} == {"a, b"}


def test_the_tag_warm_up_spares_kept_tags_and_comes_before_the_shuffling() -> None:
    rules = {"token_warmup_step": 10, "token_warmup_min": 2, "keep_tokens": 1, "shuffle_caption": True}
    assert {caption(LETTERS, seed, **rules) for seed in range(20)} == {"a, b, c", "a, c, b"}


def test_a_dropped_caption_has_no_prefix() -> None:
    assert caption("a", caption_dropout_rate=1.0, caption_prefix="P") == ""


@pytest.mark.parametrize(
    ("content", "single", "multi"),
    [
        (b"one\ntwo\n", "one", "one\ntwo"),
        (b"\n  two \n\n three", "", "two\nthree"),
        (b" \n\n", "", ""),
        (b"one\rtwo\r\nthree", "one", "one\ntwo\nthree"),
        ("a\u2028b\x0cc\x85d\ne".encode(), "a\u2028b\x0cc\x85d", "a\u2028b\x0cc\x85d\ne"),
        (b"\xef\xbb\xbfwith mark", "with mark", "with mark"),
        ("ünïcödé\r\nzwei".encode(), "ünïcödé", "ünïcödé\nzwei"),
    ],
)
def test_caption_files_are_read_by_line(tmp_path: Path, content: bytes, single: str, multi: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    text = caption_text(str(path))
    assert caption_of_text(text, multiline=False) == single
    assert caption_of_text(text, multiline=True) == multi


def test_an_empty_caption_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"a\.txt is an empty caption file"):
        caption_text(str(tmp_path / "a.txt"))


def test_another_encoding_is_refused_with_the_byte_and_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("line\nein Bär".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8: byte 0xe4 at position 10 \(line 2\).*Save the file as UTF-8"):
        caption_text(str(tmp_path / "a.txt"))


def test_utf_16_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16"):
        caption_text(str(tmp_path / "a.txt"))


def test_the_caption_file_has_the_images_name_or_that_before_four_numbers(tmp_path: Path) -> None:
    (tmp_path / "name.txt").touch()
    assert find_caption_file(str(tmp_path / "name.png"), ".txt") == str(tmp_path / "name.txt")
    assert find_caption_file(str(tmp_path / "name_10_20_30_40.png"), ".txt") == str(tmp_path / "name.txt")
    assert find_caption_file(str(tmp_path / "name.png"), ".caption") is None


def test_caption_files_of_another_ending_are_pointed_at() -> None:
    names = ["a.png", "a.txt", "b.png", "b.txt", "b.tags", "c.png", "d.txt", "a_sdxl.npz"]
    told = likely_extension(["a.png", "b.png", "c.png"], names)
    assert told == ' .txt files lie beside 2 of them: set caption_extension = ".txt" if they hold the captions.'
    assert likely_extension(["c.png"], names) == ""
