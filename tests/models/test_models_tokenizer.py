"""The tokenizers against ids that sd-scripts' tokenizers gave."""

import json
from pathlib import Path

import pytest

from library.models.sdxl.tokenizer import load_bpe, open_clip_vocabulary, tokenize
from library.options.errors import UserError

CASES = json.loads((Path(__file__).parents[1] / "compat" / "sdxl_tokenizer_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES["plain"], ids=lambda case: ascii(case["text"])[:40])
def test_ids_equal_sd_scripts(case) -> None:
    assert load_bpe().encode(case["text"]) == case["ids"]


def expand(rows: list[list[list[int]]]) -> list[list[int]]:
    return [[token for token, count in row for _ in range(count)] for row in rows]


def chunk_text(case: dict) -> str:
    return case["text"] if "text" in case else " ".join([case["repeat_word"][0]] * case["repeat_word"][1])


@pytest.mark.parametrize("case", CASES["chunks"], ids=lambda case: f"{case['max_token_length']} {chunk_text(case)[:20]!r}")
def test_rows_of_77_equal_sd_scripts(case) -> None:
    ids1, ids2 = tokenize(load_bpe(), [chunk_text(case)], case["max_token_length"] or 75)
    assert ids1[0].tolist() == expand(case["te1"])
    assert ids2[0].tolist() == expand(case["te2"])


def test_an_exclamation_mark_stays_a_word_although_its_id_also_pads() -> None:
    assert load_bpe().encode("hello!world !") == [3306, 256, 1002, 256]


def test_the_vocabulary_has_its_published_size_and_ends() -> None:
    vocabulary, merges = open_clip_vocabulary()
    assert (len(vocabulary), len(merges)) == (49408, 48894)
    known = {"!": 0, "!</w>": 256, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {word: vocabulary[word] for word in known} == known


def test_no_text_gives_no_rows() -> None:
    ids1, _ = tokenize(load_bpe(), [], 150)
    assert ids1.shape == (0, 2, 77)


@pytest.mark.parametrize("layout", ["vocab.json", "tokenizer.json"])
def test_a_tokenizer_folder_of_the_cache_is_used(tmp_path: Path, layout: str) -> None:
    vocabulary, merges = open_clip_vocabulary()
    swapped = vocabulary | {"cat</w>": vocabulary["dog</w>"], "dog</w>": vocabulary["cat</w>"]}
    folder = tmp_path / "openai_clip-vit-large-patch14"
    folder.mkdir()
    if layout == "vocab.json":
        (folder / "vocab.json").write_text(json.dumps(swapped), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]), encoding="utf-8")
    else:
        content = {"model": {"vocab": swapped, "merges": merges}}
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert load_bpe(str(tmp_path)).encode("a cat") == load_bpe().encode("a dog")


def test_a_cache_folder_without_tokenizers_falls_back_to_the_shipped_vocabulary(tmp_path: Path) -> None:
    assert load_bpe(str(tmp_path)).encode("a cat") == [320, 2368]


def test_a_damaged_tokenizer_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "openai_clip-vit-large-patch14"
    folder.mkdir()
    (folder / "vocab.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="openai_clip-vit-large-patch14 cannot be read"):
        load_bpe(str(tmp_path))


def test_a_folder_without_tokenizers_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert load_bpe(str(tmp_path)).encode("a cat") == load_bpe().encode("a cat")
    assert f"There is no folder {tmp_path / 'openai_clip-vit-large-patch14'}" in caplog.text
