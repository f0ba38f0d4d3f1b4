"""Image, alpha mask and control image lie on each other pixel by pixel, however they are resized, cropped and mirrored.

Every picture is a gradient: the level of a pixel tells where in the picture it is from.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_samples import FakeFamily, FakeVae, config, section, subset
from PIL import Image

from library.dataset.batch import Batch
from library.dataset.dataset import Dataset
from library.dataset.latent_cache import cache_latents
from library.dataset.latent_encoder import LatentEncoder
from library.dataset.loader import load_batch
from library.dataset.plan import Share
from library.options.groups.cache import CacheOptions

LOWEST_ALPHA = 128  # Pillow rounds the colours of less opaque pixels when it enlarges them
BLOCK = 8

SIZES = [(150, 100), (100, 150), (211, 97), (64, 64), (90, 61)]
SETTINGS: dict[str, dict[str, Any]] = {
    "no buckets": {},
    "buckets": {"enable_bucket": True},
    "no upscale": {"enable_bucket": True, "bucket_no_upscale": True},
}
RULES: dict[str, dict[str, Any]] = {
    "centre": {},
    "flip": {"flip_aug": True},
    "random": {"random_crop": True},
    "random and flip": {"random_crop": True, "flip_aug": True},
    "face": {"face_crop_aug_range": (1.0, 3.0), "random_crop": True, "flip_aug": True},
    "bicubic": {"resize_interpolation": "bicubic"},
}


def gradient(size: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return (H, W, 2): how far right and how far down each pixel is, from 0 to 1."""
    x, y = np.meshgrid((np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1])
    return np.dstack([x, y])


def write_gradients(folder: Path, control_scale: float = 1.0) -> None:
    (folder / "images").mkdir(parents=True)
    (folder / "controls").mkdir()
    for number, size in enumerate(SIZES):
        where = gradient(size)
        alpha = LOWEST_ALPHA + where[..., 0] * (255 - LOWEST_ALPHA)
        levels = np.dstack([where * 255, np.zeros(size[::-1]), alpha])
        name = f"im{number}_{size[0] // 2}_{size[1] // 3}_20_20"
        Image.fromarray(np.rint(levels).astype(np.uint8)).save(folder / "images" / f"{name}.png")
        (folder / "images" / f"{name}.txt").write_text("a gradient")
        other = (round(size[0] * control_scale), round(size[1] * control_scale))
        control = np.dstack([gradient(other) * 255, np.zeros(other[::-1])])
        Image.fromarray(np.rint(control).astype(np.uint8)).save(folder / "controls" / f"{name}.webp", lossless=True)


def dataset_of(folder: Path, setting: str, rules: dict[str, Any], **more: Any) -> Dataset:
    source = subset(folder / "images", alpha_mask=True, conditioning_data_dir=str(folder / "controls"), num_repeats=3, **rules)
    return Dataset(config(section(source, **SETTINGS[setting], **more)), 5)


def check(dataset: Dataset, batch: Batch, use: int) -> None:
    item, draws = dataset.item_of(use), dataset.draws(use, 1)
    assert batch.masks is not None and batch.conditioning is not None
    (width, height), resized = item.geometry.bucket, draws.placement.resized
    assert batch.masks.shape == (1, height, width)
    assert batch.conditioning.shape == (1, 3, height, width)
    x = torch.arange(width) + draws.placement.crop[0] + 0.5
    y = torch.arange(height) + draws.placement.crop[1] + 0.5
    wanted_x = (x.flip(0) if draws.flipped else x).expand(height, width)
    wanted_y = y[:, None].expand(height, width)
    control = (batch.conditioning[0] + 1) / 2
    mask = (batch.masks[0] * 255 - LOWEST_ALPHA) / (255 - LOWEST_ALPHA)
    seen = {"control x": (control[0], wanted_x, 0), "control y": (control[1], wanted_y, 1), "mask x": (mask, wanted_x, 0)}
    if batch.images is not None:
        image = (batch.images[0] + 1) / 2
        seen |= {"image x": (image[0], wanted_x, 0), "image y": (image[1], wanted_y, 1)}
    for name, (levels, wanted, axis) in seen.items():
        offsets = torch.nn.functional.avg_pool2d((levels * resized[axis] - wanted)[None], BLOCK)  # evens the rounding to 8 bits out
        assert offsets.abs().max() < 0.6, (name, item.size, float(offsets.abs().max()))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_image_mask_and_control_image_are_less_than_a_pixel_apart(tmp_path: Path, setting: str, rules: str) -> None:
    write_gradients(tmp_path)
    dataset = dataset_of(tmp_path, setting, RULES[rules])
    for use in range(dataset.num_uses):
        check(dataset, load_batch(dataset, 1, Share((use,), 1.0)), use)


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("rules", ["flip", "random"])
def test_control_images_of_another_size_but_the_same_shape_lie_on_their_image(tmp_path: Path, scale: float, rules: str) -> None:
    write_gradients(tmp_path, scale)
    dataset = dataset_of(tmp_path, "no buckets", RULES[rules])
    for use in range(dataset.num_uses):
        check(dataset, load_batch(dataset, 1, Share((use,), 1.0)), use)


@pytest.mark.parametrize("options", [CacheOptions(cache_latents=True), CacheOptions(cache_latents_to_disk=True)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_masks_and_control_images_also_lie_on_cached_latents(
    tmp_path: Path, family: FakeFamily, vae: FakeVae, setting: str, options: CacheOptions
) -> None:
    write_gradients(tmp_path)
    dataset, plain = (dataset_of(tmp_path, setting, {"flip_aug": True}) for _ in range(2))
    cache_latents(dataset, family, LatentEncoder(family, lambda: vae, torch.device("cpu"), torch.float32, 1), options)
    for use in range(dataset.num_uses):
        batch, other = (load_batch(source, 1, Share((use,), 1.0)) for source in (dataset, plain))
        check(dataset, batch, use)
        assert torch.equal(batch.masks, other.masks)
        assert torch.equal(batch.conditioning, other.conditioning)
        small = torch.nn.functional.avg_pool2d(other.images, 8)
        assert (batch.latents[:, :2] - small[:, :2]).abs().max() < 0.06  # the latents of this family are the image made small


def test_the_check_sees_an_error_of_one_pixel(tmp_path: Path) -> None:
    write_gradients(tmp_path)
    dataset = dataset_of(tmp_path, "buckets", {})
    batch = load_batch(dataset, 1, Share((0,), 1.0))
    assert batch.conditioning is not None
    batch.conditioning[:] = batch.conditioning.roll(1, -1)
    with pytest.raises(AssertionError, match="control x"):
        check(dataset, batch, 0)
