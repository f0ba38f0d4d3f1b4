"""What is done to pictures before training, from the dataset file to the trained weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sdxl_train_network
from library.options.errors import UsageError
from tests.cli.training_commands import arguments, weights, write_dataset

STEPS = ["--max_train_steps", "2", "--network_dropout", "0"]


def with_key(dataset: Path, line: str, name: str = "changed.toml") -> Path:
    """Write a copy of the dataset file with one more line in its subset."""
    changed = dataset.with_name(name)
    changed.write_text(f"{dataset.read_text()}{line}\n", encoding="utf-8")
    return changed


def trained(checkpoint: Path, dataset: Path, output: Path, *more: str) -> dict[str, torch.Tensor]:
    sdxl_train_network.main(arguments(checkpoint, dataset, output, *STEPS, *more))
    return weights(output / "net.safetensors")


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def write_masks(dataset: Path, level: int) -> Path:
    masks = dataset.parent / f"masks{level}"
    masks.mkdir()
    for path in (dataset.parent / "images").glob("*.jpg"):
        with Image.open(path) as image:
            Image.new("L", image.size, level).save(masks / f"{path.stem}.png")
    return masks


def test_masks_in_a_folder_decide_what_is_learned(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    plain = write_dataset(tmp_path, photos)
    learned = {}
    for level in (0, 255):
        masks = write_masks(plain, level)
        dataset = with_key(plain, f'conditioning_data_dir = "{masks.as_posix()}"', f"{level}.toml")
        learned[level] = trained(tiny_checkpoint, dataset, tmp_path / str(level), "--masked_loss")
    without = trained(tiny_checkpoint, plain, tmp_path / "without")
    ups = [name for name in without if "lora_up" in name]
    assert not any(learned[0][name].any() for name in ups)  # black everywhere: no loss, no gradient
    assert all(torch.equal(learned[255][name], without[name]) for name in ups)  # white everywhere: as without masks


def test_transparency_masks_the_loss_cached_or_not(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    plain = write_dataset(tmp_path, photos)
    for path in (tmp_path / "images").glob("*.jpg"):
        with Image.open(path) as image:
            rgba = np.dstack([np.asarray(image), np.zeros(image.size[::-1], np.uint8)])
        Image.fromarray(rgba).save(path.with_suffix(".png"))
        path.unlink()
    masked = with_key(plain, "alpha_mask = true")
    for name, more in {"live": [], "memory": ["--cache_latents"], "disk": ["--cache_latents_to_disk"]}.items():
        learned = trained(tiny_checkpoint, masked, tmp_path / name, *more)
        assert not any(tensor.any() for key, tensor in learned.items() if "lora_up" in key), name
    again = trained(tiny_checkpoint, plain, tmp_path / "white", "--cache_latents_to_disk")
    assert any(tensor.any() for key, tensor in again.items() if "lora_up" in key)


@pytest.mark.parametrize("key", ["color_aug = true", "random_crop = true", "face_crop_aug_range = [0.5, 1.0]"])
def test_augmentation_changes_what_is_learned(tiny_checkpoint: Path, photos: Path, tmp_path: Path, key: str) -> None:
    plain = write_dataset(tmp_path, photos, repeats=3)
    plain.write_text(plain.read_text().replace("enable_bucket = true", "enable_bucket = false"), encoding="utf-8")
    for path in list((tmp_path / "images").iterdir()):
        path.rename(path.with_stem(f"{path.stem}_40_40_30_30"))
    varied = with_key(plain, key)
    assert not is_same(trained(tiny_checkpoint, plain, tmp_path / "a"), trained(tiny_checkpoint, varied, tmp_path / "b"))
    with pytest.raises((UsageError, SystemExit)):
        trained(tiny_checkpoint, varied, tmp_path / "c", "--cache_latents")


def test_the_crop_that_is_told_changes_what_is_learned(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    plain = write_dataset(tmp_path, photos)
    plain.write_text(plain.read_text().replace("enable_bucket = true", "enable_bucket = false"), encoding="utf-8")
    as_usual = trained(tiny_checkpoint, plain, tmp_path / "a")
    assert not is_same(as_usual, trained(tiny_checkpoint, plain, tmp_path / "b", "--true_crop_conditioning"))
    assert is_same(as_usual, trained(tiny_checkpoint, plain, tmp_path / "c"))
