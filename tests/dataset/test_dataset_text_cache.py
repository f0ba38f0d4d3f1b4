"""Cached text outputs: the processed caption is encoded, entries are made again when they must be, memory and disk agree."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_samples import FakeFamily, config, make_loader, section, subset

from library.dataset.batch import Batch
from library.dataset.cache_stamps import CacheReport
from library.dataset.dataset import Dataset
from library.dataset.text_cache import cache_text_outputs
from library.dataset.text_encoder import TextEncoder
from library.models.prompt_weights import PromptStyle
from library.options.errors import UserError
from library.options.groups.cache import CacheOptions

DISK = CacheOptions(cache_text_encoder_outputs_to_disk=True)
MEMORY = CacheOptions(cache_text_encoder_outputs=True)


def dataset_of(folder: Path, **rules: Any) -> Dataset:
    return Dataset(config(section(subset(folder, **rules), enable_bucket=True)), 1)


def cache(
    dataset: Dataset,
    family: FakeFamily,
    options: CacheOptions = DISK,
    *,
    trust_foreign: bool = True,
    dtype: Any = torch.float32,
    style: PromptStyle | None = None,
    **more: Any,
) -> CacheReport:
    encoder = TextEncoder(family, lambda: [None, None], torch.device("cpu"), dtype, family.max_token_length, 2, style)
    return cache_text_outputs(dataset, encoder, options, trust_foreign=trust_foreign, **more)


def strip_stamp(path: Path) -> None:
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files if not name.startswith("atelier")}
    np.savez(path, **arrays)


def assert_outputs_are_of_captions(batch: Batch, family: FakeFamily) -> None:
    assert batch.text_cond is not None
    expected = family.encode_text(family.tokenize(batch.captions), [])
    assert batch.text_cond.keys() == expected.keys()
    assert all(torch.equal(batch.text_cond[name], expected[name]) for name in expected)


def test_files_have_sd_scripts_names_and_keys(folder: Path, family: FakeFamily) -> None:
    cache(dataset_of(folder), family)
    with np.load(folder / "im0_te_outputs.npz", allow_pickle=False) as archive:
        assert set(archive.files) == {"hidden_state1", "hidden_state2", "pool2", "atelier_stamp"}
        assert archive["hidden_state1"].shape == (77, 3)


def test_the_caption_is_encoded_with_every_fixed_step_applied(folder: Path, family: FakeFamily) -> None:
    (folder / "im0.txt").write_text("edited;;here\n")
    cache(dataset_of(folder, caption_prefix="P,", caption_suffix=", S", secondary_separator=";;"), family)
    assert "P, edited,here , S" in family.encoded_texts


def test_a_second_run_encodes_nothing(folder: Path, family: FakeFamily) -> None:
    assert dict(cache(dataset_of(folder), family).made) == {"new": 5}
    family.encoded_texts.clear()
    report = cache(dataset_of(folder), family)
    assert (report.kept, report.made.total(), family.encoded_texts) == (5, 0, [])


def test_an_edited_caption_is_encoded_again_alone(folder: Path, family: FakeFamily) -> None:
    cache(dataset_of(folder), family)
    (folder / "im2.txt").write_text("edited\n")
    family.encoded_texts.clear()
    assert dict(cache(dataset_of(folder), family).made) == {"of a caption that changed": 1}
    assert family.encoded_texts == ["edited"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fingerprint": "te-2"}, "of other text encoders"),
        ({"max_token_length": 150}, "of another --max_token_length"),
        ({"dtype": torch.float16}, "in another precision"),
        ({"rules": {"caption_prefix": "P"}}, "of a caption that changed"),
    ],
)
def test_other_settings_make_all_entries_again(folder: Path, family: FakeFamily, change: dict[str, Any], reason: str) -> None:
    cache(dataset_of(folder), family)
    family.fingerprints["text_encoders"] = change.get("fingerprint", "te-1")
    family.max_token_length = change.get("max_token_length", 75)
    report = cache(dataset_of(folder, **change.get("rules", {})), family, dtype=change.get("dtype", torch.float32))
    assert dict(report.made) == {reason: 5}


@pytest.mark.parametrize("content", [b"", b"PK broken"])
def test_damaged_files_are_made_again(folder: Path, family: FakeFamily, content: bytes) -> None:
    cache(dataset_of(folder), family)
    (folder / "im1_te_outputs.npz").write_bytes(content)
    assert dict(cache(dataset_of(folder), family).made) == {"damaged": 1}


def test_files_of_sd_scripts_are_trusted_for_folders_but_not_for_single_files(folder: Path, family: FakeFamily) -> None:
    cache(dataset_of(folder), family)
    for path in folder.glob("*_te_outputs.npz"):
        strip_stamp(path)
    assert cache(dataset_of(folder), family).kept == 5
    report = cache(dataset_of(folder), family, trust_foreign=False)
    assert report.made.total() == 5
    assert "pooled output is not right for a single-file checkpoint" in report.sentence()


def test_files_of_sd_scripts_must_fit_caption_and_length(folder: Path, family: FakeFamily) -> None:
    cache(dataset_of(folder), family)
    for path in folder.glob("*_te_outputs.npz"):
        strip_stamp(path)
    os.utime(folder / "im0_te_outputs.npz", (1, 1))
    assert dict(cache(dataset_of(folder), family).made) == {"of a caption that changed": 1}
    for path in folder.glob("*_te_outputs.npz"):
        strip_stamp(path)
    family.max_token_length = 150
    assert dict(cache(dataset_of(folder), family).made) == {"of another --max_token_length": 5}


def test_existing_files_are_trusted_when_asked_for(folder: Path, family: FakeFamily) -> None:
    cache(dataset_of(folder), family)
    family.fingerprints["text_encoders"] = "te-2"
    assert cache(dataset_of(folder), family, DISK.model_copy(update={"skip_cache_check": True})).kept == 5


def test_in_memory_each_caption_is_encoded_once(folder: Path, family: FakeFamily) -> None:
    for path in folder.glob("*.txt"):
        path.write_text("the same\n")
    cache(dataset_of(folder), family, MEMORY)
    assert family.encoded_texts == ["the same"]
    assert not list(folder.glob("*.npz"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [DISK, MEMORY])
def test_batches_carry_the_outputs_of_their_captions(folder: Path, family: FakeFamily, options: CacheOptions, workers: int) -> None:
    dataset = dataset_of(folder)
    cache(dataset, family, options)
    for batch in make_loader(dataset, 1, num_workers=workers):
        assert_outputs_are_of_captions(batch, family)


def test_one_image_with_two_captions_has_both_in_its_file(folder: Path, family: FakeFamily) -> None:
    two = Dataset(config(section(subset(folder)), section(subset(folder, caption_prefix="P"))), 1)
    assert cache(two, family).made == {"new": 10}
    assert len(list(folder.glob("*.npz"))) == 5
    for batch in make_loader(two, 1):
        assert_outputs_are_of_captions(batch, family)


def test_outputs_that_are_not_finite_are_refused_with_the_caption(folder: Path, family: FakeFamily) -> None:
    encode = family.encode_text
    family.encode_text = lambda tokens, encoders: {name: value / 0 for name, value in encode(tokens, encoders).items()}
    with pytest.raises(UserError, match=r"not finite for the caption 'picture 0, tag a, tag b'.*bf16"):
        cache(dataset_of(folder), family, dtype=torch.float16)


def test_processes_share_the_captions(folder: Path, family: FakeFamily) -> None:
    made = [cache(dataset_of(folder), family, process_index=rank, num_processes=2).made.total() for rank in (0, 1)]
    assert made == [3, 2]
    assert cache(dataset_of(folder), family).kept == 5


WEIGHTED = PromptStyle.of_training()
ANOTHER_READING = {"with brackets that are read in another way": 1}


def hidden_of(folder: Path, name: str) -> Any:
    with np.load(folder / f"{name}_te_outputs.npz") as archive:
        return archive["hidden_state1"]


def test_only_captions_with_brackets_are_encoded_again_when_weights_are_switched_on_or_off(
    folder: Path, family: FakeFamily
) -> None:
    (folder / "im3.txt").write_text("(bold:1.5) and plain\n")
    assert dict(cache(dataset_of(folder), family).made) == {"new": 5}
    plain = hidden_of(folder, "im3")
    for style, factor in ((WEIGHTED, 1.5), (None, 1.0)):
        family.encoded_texts.clear()
        assert dict(cache(dataset_of(folder), family, style=style).made) == ANOTHER_READING
        assert family.encoded_texts == ["(bold:1.5) and plain"]
        np.testing.assert_allclose(hidden_of(folder, "im3"), plain * factor)
        assert cache(dataset_of(folder), family, style=style).made.total() == 0


def test_files_of_sd_scripts_do_not_say_whether_brackets_were_weights(folder: Path, family: FakeFamily) -> None:
    (folder / "im3.txt").write_text("(bold:1.5) and plain\n")
    cache(dataset_of(folder), family)
    for path in folder.glob("*_te_outputs.npz"):
        strip_stamp(path)
    assert dict(cache(dataset_of(folder), family, style=WEIGHTED).made) == ANOTHER_READING


def test_weighted_captions_are_kept_in_memory_with_their_weights(folder: Path, family: FakeFamily) -> None:
    for path in folder.glob("*.txt"):
        path.write_text("(bold:1.5)\n")
    plain, weighted = dataset_of(folder), dataset_of(folder)
    cache(plain, family, MEMORY)
    cache(weighted, family, MEMORY, style=WEIGHTED)
    for one, other in zip(make_loader(plain, 1), make_loader(weighted, 1), strict=True):
        assert one.text_cond is not None
        assert other.text_cond is not None
        torch.testing.assert_close(other.text_cond["hidden1"], one.text_cond["hidden1"] * 1.5)
