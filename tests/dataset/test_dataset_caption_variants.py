"""Captions that vary, as texts that are encoded once: which texts, how often each, and what a change of settings rebuilds."""

import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_samples import FakeFamily, config, make_loader, section, subset

from library.dataset.cache_stamps import CacheReport
from library.dataset.caption_variants import CaptionVariants
from library.dataset.dataset import Dataset
from library.dataset.loader import Loader
from library.dataset.text_cache import cache_text_outputs
from library.dataset.text_encoder import TextEncoder
from library.options.dataset_config import CaptionRules
from library.options.errors import UserError
from library.options.groups.cache import CacheOptions

DISK = {"cache_text_encoder_outputs_to_disk": True}
MEMORY = {"cache_text_encoder_outputs": True}
VARYING = {
    "shuffle_caption": True, "keep_tokens": 1, "caption_tag_dropout_rate": 0.3, "caption_dropout_rate": 0.3,
    "enable_wildcard": True, "caption_prefix": "P,", "caption_suffix": ", {s|t}",
}  # fmt: skip


def variants(text: str, count: int = 10, image: str = "im", **rules: Any) -> tuple[str, ...]:
    return CaptionVariants(text, CaptionRules(**rules), image, count).texts()


def dataset_of(folder: Path, seed: int = 1, repeats: int = 1, **rules: Any) -> Dataset:
    return Dataset(config(section(subset(folder, num_repeats=repeats, **rules), enable_bucket=True)), seed)


def cache(dataset: Dataset, family: FakeFamily, count: int = 10, where: Any = DISK, **more: Any) -> CacheReport:
    encoder = TextEncoder(family, lambda: [None, None], torch.device("cpu"), torch.float32, family.max_token_length, batch_size=2)
    family.encoded_texts.clear()
    options = CacheOptions(**where | {"text_cache_variants": count})
    return cache_text_outputs(dataset, encoder, options, **{"trust_foreign": True} | more)


def test_a_caption_that_does_not_vary_is_one_text_with_every_fixed_step_applied() -> None:
    assert variants("a;b", caption_prefix="P,", caption_suffix=", S", secondary_separator=";") == ("P, a,b , S",)
    assert variants("a, b", caption_dropout_rate=0.5, caption_dropout_every_n_epochs=2) == ("a, b",)


def test_variants_are_distinct_bounded_and_the_same_in_every_run() -> None:
    some = variants("a, b, c, d, e, f", 4, shuffle_caption=True)
    assert len(some) == len(set(some)) == 4
    assert all(sorted(text.split(", ")) == list("abcdef") for text in some)
    assert variants("a, b, c, d, e, f", 4, shuffle_caption=True) == some
    assert variants("a, b, c, d, e, f", 9, shuffle_caption=True)[:4] == some
    assert variants("a, b, c, d, e, f", 4, image="other", shuffle_caption=True) != some
    assert set(variants("a, b", 50, shuffle_caption=True)) == {"a, b", "b, a"}
    assert set(variants("l1\nl2 {x|y}", 50, enable_wildcard=True)) == {"l1", "l2 x", "l2 y"}


@pytest.mark.parametrize("where", [DISK, MEMORY])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_carry_the_outputs_of_the_text_that_was_drawn(
    folder: Path, family: FakeFamily, where: dict[str, bool], workers: int
) -> None:
    dataset = dataset_of(folder, repeats=4, **VARYING)
    cache(dataset, family, 3, where)
    seen: set[str] = set()
    for epoch in (1, 2):
        for batch in make_loader(dataset, epoch, num_workers=workers):
            expected = family.encode_text(family.tokenize(batch.captions), [])
            assert batch.text_cond is not None
            assert all(torch.equal(batch.text_cond[name], expected[name]) for name in expected)
            seen.update(batch.captions)
    allowed = {text for item in dataset.items for text in dataset.cached_texts(item)}
    assert "" in seen
    assert 6 < len(seen - {""}) <= 15
    assert seen <= allowed | {""}
    assert all(text.startswith("P") and "{" not in text for text in allowed)


def test_memory_and_disk_draw_the_same_texts_whatever_the_seed_of_the_caching_run(folder: Path, family: FakeFamily) -> None:
    cache(dataset_of(folder, seed=5, **VARYING), family)
    disk, memory = dataset_of(folder, **VARYING), dataset_of(folder, **VARYING)
    assert cache(disk, family).made == {}
    cache(memory, family, where=MEMORY)
    assert [disk.draws(use, 3) for use in range(5)] == [memory.draws(use, 3) for use in range(5)]


def test_captions_are_dropped_in_the_same_uses_as_without_a_cache(folder: Path, family: FakeFamily) -> None:
    rules = VARYING | {"caption_dropout_every_n_epochs": 3}
    cached, live = dataset_of(folder, repeats=40, **rules), dataset_of(folder, repeats=40, **rules)
    cache(cached, family, 2, MEMORY)
    for epoch in (1, 2, 3):
        dropped = [not cached.draws(use, epoch).caption for use in range(200)]
        assert dropped == [not live.draws(use, epoch).caption for use in range(200)]
        assert all(dropped) if epoch == 3 else 40 < sum(dropped) < 80


def test_texts_come_up_as_often_as_without_a_cache(folder: Path, family: FakeFamily) -> None:
    for path in folder.glob("*.txt"):
        path.write_text("a, b\n")
    rules = {"caption_tag_dropout_rate": 0.25, "keep_tokens": 1}
    cached, live = dataset_of(folder, repeats=400, **rules), dataset_of(folder, repeats=400, **rules)
    cache(cached, family, 200, MEMORY)
    shares = [Counter(dataset.draws(use, 1).caption for use in range(2000))["a"] / 2000 for dataset in (cached, live)]
    assert shares == pytest.approx([0.25, 0.25], abs=0.05)


def test_the_warm_up_of_tags_has_stages_of_one_text_each(folder: Path, family: FakeFamily) -> None:
    rules = {"token_warmup_min": 1, "token_warmup_step": 0.5, "shuffle_caption": True}
    texts = variants("a, b, c, d, e, f, g, h, i", 4, **rules)
    assert Counter(len(text.split(", ")) for text in texts) == {9: 4, 1: 1, 3: 1, 5: 1, 7: 1}
    dataset = dataset_of(folder, **rules)
    cache(dataset, family, 4, MEMORY)
    (folder / "im0.txt").write_text("a, b, c, d, e, f, g, h, i\n")
    dataset = dataset_of(folder, **rules)
    cache(dataset, family, 4, MEMORY)
    allowed = dataset.cached_texts(dataset.items[0])
    for update, tags in ((0, 1), (12, 1), (13, 3), (49, 7), (50, 9), (99, 9)):
        caption = dataset.draws(0, 1, update=update, total_updates=100).caption
        assert len(caption.split(", ")) == tags
        assert caption in allowed


def test_the_first_text_lies_under_sd_scripts_names_and_further_ones_behind(folder: Path, family: FakeFamily) -> None:
    dataset = dataset_of(folder, shuffle_caption=True, caption_dropout_rate=0.1)
    cache(dataset, family, 3)
    texts = dataset.cached_texts(dataset.items[0])
    assert len(texts) == 3
    with np.load(folder / "im0_te_outputs.npz", allow_pickle=False) as archive:
        names = {"hidden_state1", "hidden_state2", "pool2"}
        assert set(archive.files) == {name + end for name in names for end in ("", "_variant1", "_variant2")} | {"atelier_stamp"}
        for end, text in zip(("", "_variant1", "_variant2"), texts, strict=True):
            assert archive[f"pool2{end}"][:2].tolist() == [len(text), sum(text.encode()) % 1000]
    with np.load(folder / "_te_outputs.npz", allow_pickle=False) as archive:
        assert archive["pool2"][:2].tolist() == [0, 0]
    assert len(list(folder.glob("*.npz"))) == 6


def test_the_empty_caption_is_encoded_once_and_only_where_captions_are_dropped(folder: Path, family: FakeFamily) -> None:
    cache(dataset_of(folder, shuffle_caption=True), family)
    assert not (folder / "_te_outputs.npz").exists()
    assert cache(dataset_of(folder, shuffle_caption=True, caption_dropout_every_n_epochs=2), family).made == {"new": 1}
    assert family.encoded_texts == [""]


def test_in_memory_each_text_is_encoded_once(folder: Path, family: FakeFamily) -> None:
    for path in folder.glob("*.txt"):
        path.write_text("a, b\n")
    cache(dataset_of(folder, shuffle_caption=True, caption_dropout_rate=0.5), family, 20, MEMORY)
    assert sorted(family.encoded_texts) == ["", "a, b", "b, a"]


def edit_caption(folder: Path) -> None:
    (folder / "im2.txt").write_text("quite, another, text, with, six, tags\n")


SIX_TAGS = "one, two, three, four, five, six\n"


@pytest.mark.parametrize(
    ("change", "count", "rules", "made"),
    [
        (None, 4, {}, {}),
        (None, 6, {}, {"of further variants": 10}),
        (None, 2, {}, {}),
        (edit_caption, 4, {}, {"of a caption that changed": 4}),
        (None, 4, {"caption_prefix": "P,"}, {"of a caption that changed": 20}),
        (None, 4, {"caption_dropout_rate": 0.2}, {}),
        (lambda folder: (folder / "_te_outputs.npz").unlink(), 4, {}, {"new": 1}),
        (lambda folder: os.truncate(folder / "im1_te_outputs.npz", 999), 4, {}, {"damaged": 4}),
    ],
)
def test_a_change_rebuilds_exactly_the_texts_it_concerns(
    folder: Path, family: FakeFamily, change: Any, count: int, rules: dict[str, Any], made: dict[str, int]
) -> None:
    for path in folder.glob("*.txt"):
        path.write_text(SIX_TAGS)
    before = {"shuffle_caption": True, "caption_dropout_rate": 0.1}
    assert cache(dataset_of(folder, **before), family, 4).made == {"new": 21}
    if change:
        change(folder)
    dataset = dataset_of(folder, **before | rules)
    report = cache(dataset, family, count)
    assert report.made == made
    assert len(family.encoded_texts) <= sum(made.values())
    assert cache(dataset_of(folder, **before | rules), family, count).made == {}
    for batch in make_loader(dataset, 1):
        expected = family.encode_text(family.tokenize(batch.captions), [])
        assert batch.text_cond is not None
        assert torch.equal(batch.text_cond["pool2"], expected["pool2"])


def test_another_seed_rebuilds_nothing(folder: Path, family: FakeFamily) -> None:
    cache(dataset_of(folder, **VARYING), family)
    assert cache(dataset_of(folder, seed=9, **VARYING), family).made == {}


def test_the_cost_is_told_in_one_line(folder: Path, family: FakeFamily, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for path in folder.glob("*.txt"):
        path.write_text(SIX_TAGS)
    cache(dataset_of(folder), family)
    assert "become" not in caplog.text
    cache(dataset_of(folder, shuffle_caption=True, caption_dropout_rate=0.1), family, 3)
    cache(dataset_of(folder, shuffle_caption=True, caption_dropout_rate=0.1), family, 3)
    cache(dataset_of(folder, shuffle_caption=True, caption_dropout_rate=0.1), family, 3, MEMORY)
    lines = [record.getMessage() for record in caplog.records if "become" in record.getMessage()]
    head = (
        r"Captions vary with shuffle_caption, caption_dropout_rate: those of 5 images become 16 texts \(--text_cache_variants 3\)"
    )
    ends = ["on disk, and about 1 s to encode", "on disk", "in memory, and about 1 s to encode"]
    assert len(lines) == 3
    assert all(re.fullmatch(rf"{head}, which take 0\.\d MB {end}\.", line) for line, end in zip(lines, ends, strict=True))


def test_a_file_without_the_text_is_told_when_nobody_looked_into_it_before(folder: Path, family: FakeFamily) -> None:
    dataset = dataset_of(folder, shuffle_caption=True)
    cache(dataset, family, 3)
    dataset.text_variants = 30
    with pytest.raises(UserError, match=r"_te_outputs\.npz does not hold the caption '"):
        [list(make_loader(dataset, epoch)) for epoch in range(1, 5)]


def test_with_skip_cache_check_files_of_sd_scripts_give_their_one_text(folder: Path, family: FakeFamily) -> None:
    cache(dataset_of(folder), family)
    for path in folder.glob("*_te_outputs.npz"):
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files if not name.startswith("atelier")}
        np.savez(path, **arrays)
    dataset = dataset_of(folder, shuffle_caption=True)
    assert cache(dataset, family, where=DISK | {"skip_cache_check": True}).kept > 5
    for batch in make_loader(dataset, 1):
        assert batch.text_cond is not None
        assert all(key.removesuffix(".png")[-1] in "01234" for key in batch.image_keys)
        assert batch.text_cond["pool2"][:, 0].tolist() == [len("picture 0, tag a, tag b")] * batch.size


@pytest.mark.parametrize("where", [DISK, MEMORY])
def test_held_out_images_have_their_settled_caption(folder: Path, family: FakeFamily, where: dict[str, bool]) -> None:
    dataset = dataset_of(folder, validation_split=0.4, validation_seed=1, **VARYING)
    assert len(dataset.held_out) == 2
    cache(dataset, family, 4, where)
    for batch in Loader(dataset).held_out():
        assert all(caption.startswith("P, picture") and caption.endswith("tag a, tag b, s") for caption in batch.captions)
        expected = family.encode_text(family.tokenize(batch.captions), [])
        assert batch.text_cond is not None
        assert torch.equal(batch.text_cond["pool2"], expected["pool2"])
