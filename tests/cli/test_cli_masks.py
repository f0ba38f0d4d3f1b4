"""Masks of the loss from the picture to the trained weights: control images and alpha channels, in both training scripts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.training_commands import FINETUNE, arguments, finetune_arguments, run_command, weights, write_dataset

ONE_STEP = ["--max_train_steps", "1", "--network_train_unet_only", "--network_dropout", "0", "--max_grad_norm", "0"]
SGD = ["--optimizer_type", "SGD", "--learning_rate", "1"]


@pytest.fixture
def dataset(tmp_path: Path, photos: Path) -> Path:
    """One picture, in a size that is neither cropped nor resized."""
    file = write_dataset(tmp_path, photos, batch_size=1, count=1)
    (path,) = (tmp_path / "images").glob("*.jpg")
    with Image.open(path) as image:
        image.resize((64, 64)).save(path)
    file.write_text(file.read_text().replace("flip_aug = true\n", ""), encoding="utf-8")
    return file


def with_masks(dataset: Path, left: int, right: int) -> list[str]:
    """Give the picture a mask of two halves, and return the options that use it."""
    masks = dataset.parent / "masks"
    masks.mkdir(exist_ok=True)
    (picture,) = (dataset.parent / "images").glob("*.jpg")
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32, 0], pixels[:, 32:, 0] = left, right  # red alone counts
    Image.fromarray(pixels).save(masks / f"{picture.stem}.png")
    changed = dataset.with_name(f"masked_{left}_{right}.toml")
    changed.write_text(f'{dataset.read_text()}conditioning_data_dir = "{masks.as_posix()}"\n', encoding="utf-8")
    return ["--dataset_config", str(changed), "--masked_loss"]


def transparent(dataset: Path) -> list[str]:
    """Make the picture wholly transparent, and return the options that take its alpha channel as mask."""
    (picture,) = (dataset.parent / "images").glob("*.jpg")
    with Image.open(picture) as image:
        image.putalpha(0)
        image.save(picture.with_suffix(".png"))
    picture.unlink()
    changed = dataset.with_name("alpha.toml")
    changed.write_text(f"{dataset.read_text()}alpha_mask = true\n", encoding="utf-8")
    return ["--dataset_config", str(changed)]


def learned(checkpoint: Path, dataset: Path, *more: str) -> tuple[dict[str, torch.Tensor], str]:
    """Train a network for one step and return its upper matrices and what was said."""
    done = run_command(arguments(checkpoint, dataset, dataset.parent / "out", *ONE_STEP, *more))
    assert done.returncode == 0, done.stderr
    found = weights(dataset.parent / "out" / "net.safetensors")
    return {name: tensor for name, tensor in found.items() if "lora_up" in name}, done.stderr


def test_what_the_mask_hides_teaches_nothing_and_normalising_makes_up_for_the_area(tiny_checkpoint: Path, dataset: Path) -> None:
    hidden, said = learned(tiny_checkpoint, dataset, *with_masks(dataset, 0, 0))
    assert not any(tensor.any() for tensor in hidden.values())
    assert f"masked by control images ({dataset.parent / 'images'})" in said
    half, _ = learned(tiny_checkpoint, dataset, *with_masks(dataset, 255, 0), *SGD)
    normalized, said = learned(tiny_checkpoint, dataset, *with_masks(dataset, 255, 0), *SGD, "--masked_loss_normalize")
    assert "divided by the mask's area" in said
    assert any(tensor.any() for tensor in half.values())
    for name, tensor in half.items():
        torch.testing.assert_close(normalized[name], 2 * tensor, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("cached", [[], ["--cache_latents"]], ids=["live", "cached"])
def test_what_is_transparent_teaches_nothing_with_alpha_mask_alone(tiny_checkpoint: Path, dataset: Path, cached: list[str]) -> None:
    options = transparent(dataset)
    hidden, said = learned(tiny_checkpoint, dataset, *options, *cached)
    assert not any(tensor.any() for tensor in hidden.values())
    assert "masked by alpha channels" in said


def test_alpha_masks_count_in_fine_tuning_too(tiny_checkpoint: Path, dataset: Path) -> None:
    out = dataset.parent / "out"
    options = [*transparent(dataset), "--max_train_steps", "1", "--optimizer_type", "SGD", "--learning_rate", "1"]
    done = run_command(finetune_arguments(tiny_checkpoint, dataset, out, *options), script=FINETUNE)
    assert done.returncode == 0, done.stderr
    before, after = weights(tiny_checkpoint), weights(out / "model.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
