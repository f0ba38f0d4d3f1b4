"""Looking at the data with the command that would train: `--dataset_report` and `--debug_dataset`."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from torch import nn

import sdxl_train
import sdxl_train_network
from library.models.sdxl.family import SdxlFamily
from library.options.errors import UserError
from tests.cli.training_commands import arguments, finetune_arguments, run_command, write_dataset
from tools import cache_latents


@pytest.fixture
def dataset(tmp_path: Path, photos: Path) -> Path:
    return write_dataset(tmp_path, photos, count=4, repeats=3)


def test_everything_wrong_with_a_dataset_is_told_in_one_report(dataset: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    pictures = sorted(images.glob("*.jpg"))
    pictures[0].write_bytes(pictures[0].read_bytes()[:-500])
    pictures[1].with_suffix(".txt").write_bytes(b"")
    pictures[2].with_suffix(".txt").write_bytes("Käfer".encode("latin-1"))
    pictures[3].with_suffix(".txt").write_text("a very long caption, " * 30)
    (images / "empty.png").write_bytes(b"")
    (images / "text.png").write_text("this is no picture")
    done = run_command(arguments(tiny_checkpoint, dataset, tmp_path / "out", "--dataset_report", str(tmp_path / "report")))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    facts = json.loads((tmp_path / "report" / "dataset_report.json").read_text())
    page = (tmp_path / "report" / "dataset_report.html").read_text(encoding="utf-8")
    assert {finding["kind"]: finding["count"] for finding in facts["findings"] if finding["severity"] == "error"} == {
        "unreadable_image": 3,
        "unreadable_caption": 2,
    }
    assert "long_caption" in {finding["kind"] for finding in facts["findings"]}
    for name in [
        pictures[0].name,
        pictures[1].with_suffix(".txt").name,
        pictures[2].with_suffix(".txt").name,
        "empty.png",
        "text.png",
    ]:
        assert name in done.stderr and name in page
    assert not (tmp_path / "out").exists()


def test_a_report_needs_no_model_and_says_how_long_the_run_is(
    dataset: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not(self: SdxlFamily, *args: object) -> nn.Module:
        raise AssertionError("a model is loaded")

    for part in ("load_vae", "load_text_encoders", "load_denoiser"):
        monkeypatch.setattr(SdxlFamily, part, must_not)
    report = tmp_path / "report"
    sdxl_train.main(
        finetune_arguments(tiny_checkpoint, dataset, tmp_path / "out", "--dataset_report", str(report), "--max_train_epochs", "5")
    )
    facts = json.loads((report / "dataset_report.json").read_text())
    uses = sum(bucket["batches"] for bucket in facts["datasets"][0]["buckets"])
    assert facts["images"] == 4 and facts["uses_per_epoch"] == 12
    assert facts["batches_per_epoch"] == facts["updates_per_epoch"] == uses
    assert facts["epochs"] == 5 and facts["total_updates"] == 5 * uses
    assert not (tmp_path / "out").exists()


def test_of_several_processes_only_the_first_writes(
    dataset: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report"
    args = finetune_arguments(tiny_checkpoint, dataset, tmp_path / "out", "--dataset_report", str(report), "--debug_dataset")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    sdxl_train.main(args)
    assert not report.exists() and not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", "0")
    sdxl_train.main(args)
    facts = json.loads((report / "dataset_report.json").read_text())
    assert facts["processes"] == 2
    assert facts["batches_per_epoch"] == sum(-(-bucket["uses"] // 4) for bucket in facts["datasets"][0]["buckets"])
    assert (tmp_path / "out" / "debug_dataset" / "batches.jsonl").exists()


def test_errors_of_the_data_stop_a_run_before_a_model_is_loaded(
    dataset: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SdxlFamily, "load_text_encoders", lambda *args: pytest.fail("a model is loaded"))
    (tmp_path / "images" / "empty.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"The dataset has an error"):
        sdxl_train.main(finetune_arguments(tiny_checkpoint, dataset, tmp_path / "out"))


def forbid_writing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let a folder look as to somebody without the permission to write there; root always has it."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(folder) and access(path, mode))


def test_folders_that_caches_cannot_be_written_to_are_told_with_all_else(
    dataset: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset.write_text(dataset.read_text().replace("shuffle_caption = true\n", "").replace("caption_tag_dropout_rate = 0.2\n", ""))
    args = arguments(tiny_checkpoint, dataset, tmp_path / "out", "--network_train_unet_only", "--cache_latents_to_disk")
    args += ["--cache_text_encoder_outputs_to_disk", "--max_train_steps", "1"]
    with monkeypatch.context() as patch:
        forbid_writing(patch, tmp_path / "images")
        patch.setattr(SdxlFamily, "load_text_encoders", lambda *args: pytest.fail("a model is loaded"))
        (tmp_path / "images" / "empty.png").write_bytes(b"")
        with pytest.raises(UserError) as told:
            sdxl_train_network.main(args)
        for what in ("latents", "text outputs"):
            assert f"4 files of {what} cannot be written to {tmp_path / 'images'}, such as " in str(told.value)
        assert "empty.png" in str(told.value)
        (tmp_path / "images" / "empty.png").unlink()
        tool = ["--pretrained_model_name_or_path", str(tiny_checkpoint), "--dataset_config", str(dataset)]
        with pytest.raises(UserError, match=r"4 files of latents cannot be written to"):
            cache_latents.main(tool)
    sdxl_train_network.main(args)
    forbid_writing(monkeypatch, tmp_path / "images")
    sdxl_train_network.main(args)  # nothing has to be written


def test_a_report_says_what_is_cached_and_what_is_stale_and_why(dataset: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    dataset.write_text(dataset.read_text().replace("shuffle_caption = true\n", "").replace("caption_tag_dropout_rate = 0.2\n", ""))
    on_disk = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    cached = arguments(tiny_checkpoint, dataset, tmp_path / "out", "--network_train_unet_only", *on_disk)
    report = tmp_path / "report"

    def caches() -> dict[str, dict[str, object]]:
        sdxl_train_network.main([*cached, "--dataset_report", str(report)])
        facts = json.loads((report / "dataset_report.json").read_text())
        return {cache["kind"]: cache["to_make"] | {"right": cache["right"]} for cache in facts["caches"]}

    assert caches() == {"Latents": {"new": 4, "right": 0}, "Captions": {"new": 4, "right": 0}}
    sdxl_train_network.main([*cached, "--max_train_steps", "1"])
    assert caches() == {"Latents": {"right": 4}, "Captions": {"right": 4}}
    first, second, *_ = sorted((tmp_path / "images").glob("*.jpg"))
    with Image.open(first) as image:
        turned = image.transpose(Image.Transpose.ROTATE_180)
    turned.save(first)
    second.with_suffix(".txt").write_text("another caption")
    assert caches() == {
        "Latents": {"of an image that changed": 1, "right": 3},
        "Captions": {"of a caption that changed": 1, "right": 3},
    }
    page = (report / "dataset_report.html").read_text(encoding="utf-8")
    assert "Latents: 3 are cached and right, 1 are to be encoded (1 of an image that changed)." in page


def test_showing_the_dataset_writes_pictures_and_captions_and_ends(dataset: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    dataset.write_text(
        dataset.read_text().replace("flip_aug = true", "flip_aug = true\ncaption_prefix = 'my style'\nkeep_tokens = 1")
    )
    done = run_command(arguments(tiny_checkpoint, dataset, tmp_path / "out", "--debug_dataset"))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "debug_dataset"
    told = [json.loads(line) for line in (folder / "batches.jsonl").read_text().splitlines()]
    assert sorted({line["sheet"] for line in told}) == sorted(path.name for path in folder.glob("*.png"))
    assert len(told) == 12
    assert all("my style" in line["caption"] for line in told)
    assert {line["flipped"] for line in told} == {True, False}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["debug_dataset"]


def test_cached_captions_are_shown_as_they_will_be_cached(dataset: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    more = ["--debug_dataset", "--cache_text_encoder_outputs", "--text_cache_variants", "1"]
    sdxl_train.main(finetune_arguments(tiny_checkpoint, dataset, tmp_path / "out", *more))
    told = [json.loads(line) for line in (tmp_path / "out" / "debug_dataset" / "batches.jsonl").read_text().splitlines()]
    captions: dict[str, set[str]] = {}
    for line in told:
        captions.setdefault(line["image"], set()).add(line["caption"])
    assert len(captions) == 4 and all(len(texts) == 1 for texts in captions.values())
