"""The converter as a command: there and back without a loss, and mistakes in sentences."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.options.errors import UsageError
from tests.cli.training_commands import ROOT, run_command
from tools.convert_sdxl import main

CONVERT = str(ROOT / "tools" / "convert_sdxl.py")


def test_a_file_comes_back_from_a_folder_with_the_same_tensors_and_metadata(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for source, out in ((tiny_checkpoint, "folder"), (tmp_path / "folder", "again.safetensors")):
        done = run_command([str(source), str(tmp_path / out)], script=CONVERT)
        assert done.returncode == 0, done.stderr
    before, after = load_file(tiny_checkpoint), load_file(tmp_path / "again.safetensors")
    assert after.keys() == before.keys()
    assert all(after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items())
    with safe_open(tiny_checkpoint, "pt") as one, safe_open(tmp_path / "again.safetensors", "pt") as other:
        assert one.metadata() == other.metadata()


@pytest.mark.parametrize(
    ("markers", "metadata", "predicts", "ends_in_noise"),
    [
        (["ztsnr"], {}, "epsilon", True),
        (["v_pred"], {}, "v_prediction", False),
        (["v_pred", "ztsnr"], {}, "v_prediction", True),
        ([], {"modelspec.prediction_type": "v"}, "v_prediction", False),
    ],
)
def test_what_a_file_says_of_its_prediction_passes_through_unchanged(
    tiny_checkpoint: Path, tmp_path: Path, markers: list[str], metadata: dict[str, str], predicts: str, ends_in_noise: bool
) -> None:
    tensors = load_file(tiny_checkpoint) | {marker: torch.zeros(0) for marker in markers}
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    for source, out in (("model.safetensors", "folder"), ("folder", "back.safetensors"), ("model.safetensors", "copy.safetensors")):
        main([str(tmp_path / source), str(tmp_path / out)])
    scheduler = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == (predicts, ends_in_noise)
    for name in ("back", "copy"):
        assert load_file(tmp_path / f"{name}.safetensors").keys() == tensors.keys(), name


def test_a_number_type_and_bin_files_can_be_asked_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    main([str(tiny_checkpoint), str(tmp_path / "folder"), "--bin", "--save_precision", "bf16"])
    weights = torch.load(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.bin", weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("source", "out", "more", "words"),
    [
        ("missing.safetensors", "folder", [], "There is no file or folder"),
        ("model", "model.pt", [], "should end in .safetensors or .ckpt"),
        ("model", "there", [], "there exists already"),
        ("model", "there", ["--overwrite"], "is a folder of something else"),
        ("model", "new.safetensors", ["--bin"], "--bin is for folders"),
        ("model", "model", ["--overwrite"], "is the source itself"),
    ],
)
def test_mistakes_are_told_in_one_sentence_each(tmp_path: Path, source: str, out: str, more: list[str], words: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "photo.jpg").touch()
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError) as error:
        main([str(tmp_path / source), str(tmp_path / out), *more])
    assert words in " ".join(error.value.problems)
    assert len(error.value.problems) == 1


def test_something_else_than_sdxl_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("<html>")
    done = run_command([str(tmp_path / "text.safetensors"), str(tmp_path / "out")], script=CONVERT)
    assert done.returncode == 1
    assert "a web page, probably of a failed download" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
