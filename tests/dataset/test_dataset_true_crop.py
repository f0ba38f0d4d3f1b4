"""The crop SDXL is told: that of sd-scripts, or with --true_crop_conditioning the one that is made."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_files import load
from dataset_samples import FakeFamily, FakeVae, config, section, subset
from hypothesis import given
from hypothesis import strategies as st

from library.dataset.buckets import BucketChooser, crop_top_left, true_crop_ltrb, true_crop_top_left
from library.dataset.dataset import Dataset
from library.dataset.latent_cache import cache_latents
from library.dataset.latent_encoder import LatentEncoder
from library.dataset.loader import load_batch
from library.dataset.plan import Share
from library.options.groups.cache import CacheOptions


def dataset_of(folder: Path, *, true_crop: bool, **rules: Any) -> Dataset:
    source = subset(folder, num_repeats=6, **rules)
    definition = config(section(source, enable_bucket=True, max_bucket_reso=64, resolution=(64, 64)))
    return Dataset(replace(definition, true_crop_conditioning=true_crop), 1)


def told(dataset: Dataset, use: int) -> tuple[int, ...]:
    return tuple(load_batch(dataset, 1, Share((use,), 1.0)).sizes.crop_top_left[0].tolist())


@pytest.mark.parametrize(("image", "upright", "flipped"), [
    # crops of the table of sd-scripts: 1000x1500 loses 16 rows at the top, 640x480 21 columns at the left and 22 at the right
    ((1000, 1500), (16, 0), (16, 0)), ((640, 480), (0, 21), (0, 22)), ((1920, 1080), (0, 10), (0, 11)),
    ((1024, 1024), (0, 0), (0, 0)),
])  # fmt: skip
def test_the_crop_is_that_of_the_pixels(image: tuple[int, int], upright: tuple[int, int], flipped: tuple[int, int]) -> None:
    chooser = BucketChooser(
        section(resolution=(1024, 1024), enable_bucket=True, min_bucket_reso=256, max_bucket_reso=2048, bucket_reso_steps=64)
    )
    geometry = chooser.choose(image)
    assert true_crop_top_left(geometry.bucket, geometry.placement, False) == upright
    assert true_crop_top_left(geometry.bucket, geometry.placement, True) == flipped


@given(st.integers(40, 4000), st.integers(40, 4000), st.booleans())
def test_what_is_noted_in_a_cache_means_the_same_to_the_formula(width: int, height: int, flipped: bool) -> None:
    geometry = BucketChooser(section(resolution=(512, 512), max_bucket_reso=1024, enable_bucket=True)).choose((width, height))
    noted = replace(geometry, crop_ltrb=true_crop_ltrb(geometry))
    assert crop_top_left(noted, flipped) == true_crop_top_left(geometry.bucket, geometry.placement, flipped)


@pytest.mark.parametrize("rules", [{"flip_aug": True}, {"flip_aug": True, "random_crop": True}])
def test_batches_tell_the_crop_of_their_own_pixels(folder: Path, rules: dict[str, Any]) -> None:
    dataset = dataset_of(folder, true_crop=True, **rules)
    seen = set()
    for use in range(dataset.num_uses):
        item, draws = dataset.item_of(use), dataset.draws(use, 1)
        (left, top), width = draws.placement.crop, item.geometry.bucket[0]
        wanted = (top, draws.placement.resized[0] - width - left if draws.flipped else left)
        assert told(dataset, use) == wanted
        seen.add(wanted)
    assert len(seen) > (2 if "random_crop" in rules else 1)


def test_the_default_is_the_formula_of_sd_scripts_whatever_the_crop(folder: Path) -> None:
    dataset = dataset_of(folder, true_crop=False, random_crop=True, flip_aug=True)
    for use in range(dataset.num_uses):
        assert told(dataset, use) == crop_top_left(dataset.item_of(use).geometry, dataset.draws(use, 1).flipped)
    true = dataset_of(folder, true_crop=True, random_crop=True, flip_aug=True)
    assert any(told(dataset, use) != told(true, use) for use in range(dataset.num_uses))


@pytest.mark.parametrize("true_crop", [False, True])
def test_caches_note_the_crop_that_is_told(folder: Path, family: FakeFamily, vae: FakeVae, true_crop: bool) -> None:
    dataset = dataset_of(folder, true_crop=true_crop)
    encoder = LatentEncoder(family, lambda: vae, torch.device("cpu"), torch.float32, 1)
    cache_latents(dataset, family, encoder, CacheOptions(cache_latents_to_disk=True))
    item = next(item for item in dataset.items if item.path.endswith("im3.png"))
    assert true_crop_ltrb(item.geometry) != item.geometry.crop_ltrb
    with np.load(folder / "im3_0080x0060_sdxl.npz") as archive:
        noted = tuple(archive["crop_ltrb"].tolist())
    assert noted == (true_crop_ltrb(item.geometry) if true_crop else pytest.approx(item.geometry.crop_ltrb))
    for use in range(dataset.num_uses):
        if dataset.item_of(use).path == item.path:
            assert told(dataset, use) == (int(noted[1]), int(noted[0]))
    again = dataset_of(folder, true_crop=not true_crop)
    assert cache_latents(again, family, encoder, CacheOptions(cache_latents_to_disk=True)).kept == 5  # the pixels are the same


def test_the_option_reaches_the_dataset(folder: Path) -> None:
    parent = folder.parent / "parent"
    (parent / "1_x").mkdir(parents=True)
    given = {"train_data_dir": str(parent), "resolution": "64"}
    assert load(None, **given, true_crop_conditioning=True).true_crop_conditioning
    assert not load(None, **given).true_crop_conditioning
