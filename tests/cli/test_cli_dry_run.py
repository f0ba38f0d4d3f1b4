"""--dry_run: what a run will be, and how much memory it will need, from the headers of its files alone."""

import ctypes
import json
import mmap
import struct
import sys
from pathlib import Path

import pytest

from tests.cli.training_commands import FINETUNE, arguments, finetune_arguments, run_command, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), photos, count=3)


@pytest.fixture(scope="module")
def header_alone(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The tiny checkpoint with a hole where its tensors were: what reads weights trains on zeros."""
    path = tmp_path_factory.mktemp("model") / "sdxl.safetensors"
    size = tiny_checkpoint.stat().st_size
    with tiny_checkpoint.open("rb") as file:
        length = file.read(8)
        header = file.read(struct.unpack("<Q", length)[0])
    with path.open("wb") as file:
        file.write(length + header)
        file.truncate(size)
    return path


def phases(said: str) -> dict[str, list[float]]:
    """Read the table: by phase, GiB of weights, gradients, optimizer, activations, and of all."""
    lines = said.partition("GiB ")[2].splitlines()[1:]
    cells = [line.rsplit(maxsplit=5) for line in lines[: next(i for i, line in enumerate(lines) if "Traced" in line)]]
    return {name.strip(): [float(cell) for cell in numbers] for name, *numbers in cells}


def pages_in_memory(path: Path) -> list[int]:
    """Return 1 for each page of a file that was written or read, or read ahead; else 0."""
    size = path.stat().st_size
    flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        status = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), flags)
        del start
    assert status == 0
    return [flag & 1 for flag in flags]


def test_a_network_that_fits_is_told_with_all_its_phases(header_alone: Path, dataset: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64")
    ended = run_command(
        arguments(
            header_alone, dataset, tmp_path / "out", "--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only",
            "--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--dry_run_vram", "2", "--max_train_epochs", "2",
        )
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert list(phases(ended.stderr)) == ["encoding captions", "encoding images", "training step", "sample images", "saving"]
    for words in ("It fits: ", "a GPU with 2 GiB", "total optimizer steps: 4", "U-Net      384", "1e-03"):
        assert words in ended.stderr.replace("0.001", "1e-03"), words
    assert not (tmp_path / "out").exists()
    if sys.platform == "linux":  # which alone tells; the second half is beyond what is read ahead of the header
        pages = pages_in_memory(header_alone)
        assert pages[0] and not any(pages[len(pages) // 2 :]), "weights were read"


def test_what_does_not_fit_ends_with_status_3_and_wrong_options_with_2(header_alone: Path, dataset: Path, tmp_path: Path) -> None:
    small = run_command(arguments(header_alone, dataset, tmp_path, "--dry_run_vram", "0.5"))
    assert small.returncode == 3 and "It does not fit" in small.stderr
    wrong = run_command(arguments(header_alone, dataset, tmp_path, "--dry_run", "--optimizer_type", "AdamX"))
    assert wrong.returncode == 2 and "AdamX" in wrong.stderr and "Memory" not in wrong.stderr


def test_a_budget_is_kept_with_plain_options_that_a_resumed_run_has_too(
    tiny_checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    given = ("--memory_budget", "0.71GB", "--cache_latents", "--cache_text_encoder_outputs", "--save_state")
    begun = run_command(finetune_arguments(tiny_checkpoint, dataset, tmp_path, *given, "--max_train_steps", "1"), script=FINETUNE)
    assert begun.returncode == 0, begun.stderr
    assert "To keep within --memory_budget 0.71GB, the run gets --optimizer_type AdamW8bit: 0." in begun.stderr
    manifest = json.loads((tmp_path / "model-run.json").read_text())
    assert manifest["options"]["optimizer_type"] == "AdamW8bit" and manifest["memory"] is None  # a GPU's alone is measured
    more = ("--resume", str(tmp_path / "model-state"), "--max_train_steps", "2")
    resumed = run_command(finetune_arguments(tiny_checkpoint, dataset, tmp_path, *given, *more), script=FINETUNE)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "model-run.json").read_text())["options"]["optimizer_type"] == "AdamW8bit"


def test_a_budget_that_nothing_keeps_is_refused_with_the_closest(header_alone: Path, dataset: Path, tmp_path: Path) -> None:
    ended = run_command(finetune_arguments(header_alone, dataset, tmp_path, "--memory_budget", "0.5GB"), script=FINETUNE)
    assert ended.returncode == 2
    assert (
        "--memory_budget 0.5GB: the run needs" in ended.stderr
        and "--fused_backward_pass --offload_fraction 0.9: 0." in ended.stderr
    )


def test_too_few_swapped_blocks_of_a_fine_tune_are_refused_before_anything_is_done(
    header_alone: Path, dataset: Path, tmp_path: Path
) -> None:
    fused = ("--fused_backward_pass", "--optimizer_type", "Adafactor", "--max_grad_norm", "0", "--cache_latents")
    given = finetune_arguments(header_alone, dataset, tmp_path, *fused, "--blocks_to_swap", "3")
    ended = run_command(given, script=FINETUNE)
    assert ended.returncode != 0 and "Give --blocks_to_swap 4 or more" in ended.stderr
    assert not any(words in ended.stderr for words in ("Found", "images", "encod", "Traceback"))
