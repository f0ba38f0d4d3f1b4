"""Masks from alpha channels: in batches, in memory and in cache files."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_samples import FakeFamily, FakeVae, config, make_image, make_loader, section, subset
from PIL import Image

from library.dataset.cache_stamps import CacheReport
from library.dataset.dataset import Dataset
from library.dataset.findings import Findings, Kind, Severity
from library.dataset.index import build_index
from library.dataset.latent_cache import cache_latents
from library.dataset.latent_encoder import LatentEncoder
from library.dataset.loader import load_batch
from library.dataset.plan import Share
from library.files.npz import read_npz
from library.options.groups.cache import CacheOptions

DISK, MEMORY = CacheOptions(cache_latents_to_disk=True), CacheOptions(cache_latents=True)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """One picture that is transparent on the left, one that could be but is not, one of a kind that cannot be."""
    images = tmp_path / "pictures"
    images.mkdir()
    alpha = np.full((64, 64), 255, np.uint8)
    make_image(images / "c.jpg")
    with Image.open(make_image(tmp_path / "whole.png", seed=2)) as whole:
        rgb = np.asarray(whole)
    Image.fromarray(np.dstack([rgb, alpha])).save(images / "b.png")
    alpha = alpha.copy()
    alpha[:, :32] = 51
    Image.fromarray(np.dstack([rgb, alpha])).save(images / "a.png")
    for name in "abc":
        (images / f"{name}.txt").write_text(name)
    return images


def dataset_of(folder: Path, *, alpha_mask: bool, flip_aug: bool = False, **more: Any) -> Dataset:
    return Dataset(
        config(section(subset(folder, alpha_mask=alpha_mask, flip_aug=flip_aug, num_repeats=8), batch_size=1, **more)), 1
    )


def cache(dataset: Dataset, family: FakeFamily, vae: FakeVae, options: CacheOptions = DISK) -> CacheReport:
    encoder = LatentEncoder(family, lambda: vae, torch.device("cpu"), torch.float32, 1)
    return cache_latents(dataset, family, encoder, options)


def mask_of(dataset: Dataset, name: str, *, flipped: bool = False) -> torch.Tensor | None:
    use = next(
        use
        for use in range(dataset.num_uses)
        if Path(dataset.item_of(use).path).name == name and dataset.draws(use, 1).flipped == flipped
    )
    masks = load_batch(dataset, 1, Share((use,), 1.0)).masks
    return None if masks is None else masks[0]


@pytest.mark.parametrize("options", [None, MEMORY, DISK])
def test_masks_are_alpha_and_ones_where_nothing_can_be_transparent(
    pictures: Path, family: FakeFamily, vae: FakeVae, options: CacheOptions | None
) -> None:
    dataset = dataset_of(pictures, alpha_mask=True, flip_aug=True)
    if options:
        cache(dataset, family, vae, options)
    wanted = torch.ones(64, 64)
    wanted[:, :32] = 0.2
    assert torch.allclose(mask_of(dataset, "a.png"), wanted)
    assert torch.allclose(mask_of(dataset, "a.png", flipped=True), wanted.flip(-1))
    assert torch.equal(mask_of(dataset, "b.png"), torch.ones(64, 64))
    assert torch.equal(mask_of(dataset, "c.jpg"), torch.ones(64, 64))


@pytest.mark.parametrize("options", [None, MEMORY, DISK])
def test_without_alpha_mask_there_is_no_mask_and_transparent_is_white(
    pictures: Path, family: FakeFamily, vae: FakeVae, options: CacheOptions | None
) -> None:
    dataset = dataset_of(pictures, alpha_mask=False)
    if options:
        cache(dataset, family, vae, options)
    batches = list(make_loader(dataset, 1))
    assert all(batch.masks is None for batch in batches)
    batch = next(batch for batch in batches if batch.image_keys[0].endswith("a.png"))
    left = batch.images[0, :, :, :32] if batch.images is not None else batch.latents[0, :3, :, :4]
    assert left.min() > 0.5  # four fifths white


@pytest.mark.parametrize("options", [None, MEMORY])
def test_colours_under_a_mask_are_those_of_the_picture(
    pictures: Path, family: FakeFamily, vae: FakeVae, options: CacheOptions | None
) -> None:
    dataset = dataset_of(pictures, alpha_mask=True)
    if options:
        cache(dataset, family, vae, options)
    by_name = {Path(batch.image_keys[0]).name: batch for batch in make_loader(dataset, 1)}
    a, b = (batch.images if batch.images is not None else batch.latents[:, :3] for batch in (by_name["a.png"], by_name["b.png"]))
    assert (a - b).abs().max() < 0.1


def test_a_batch_of_subsets_with_and_without_masks_has_ones_for_the_latter(pictures: Path, folder: Path) -> None:
    both = (subset(pictures, alpha_mask=True), subset(folder))
    dataset = Dataset(config(section(*both, batch_size=8)), 1)
    (batch,) = make_loader(dataset, 1)
    assert batch.masks is not None
    for key, mask in zip(batch.image_keys, batch.masks, strict=True):
        assert (float(mask.min()) < 1) == key.endswith("a.png")


@pytest.mark.parametrize("options", [None, MEMORY, DISK])
def test_transparent_pictures_of_a_subset_without_masks_have_ones_beside_those_of_one_with_masks(
    pictures: Path, tmp_path: Path, family: FakeFamily, vae: FakeVae, options: CacheOptions | None
) -> None:
    others = shutil.copytree(pictures, tmp_path / "others")
    dataset = Dataset(config(section(subset(pictures, alpha_mask=True), subset(others), batch_size=6)), 1)
    if options:
        cache(dataset, family, vae, options)
    (batch,) = make_loader(dataset, 1)
    assert batch.masks is not None
    lowest = {key: float(mask.min()) for key, mask in zip(batch.image_keys, batch.masks, strict=True)}
    assert lowest[str(pictures / "a.png")] == pytest.approx(0.2)
    assert lowest[str(others / "a.png")] == 1


def test_masks_in_files_are_those_of_sd_scripts_but_small(pictures: Path, family: FakeFamily, vae: FakeVae) -> None:
    cache(dataset_of(pictures, alpha_mask=True), family, vae)
    path = pictures / "a_0064x0064_sdxl.npz"
    with np.load(path, allow_pickle=False) as archive:
        mask = archive["alpha_mask"]
        assert (mask.dtype, mask.shape) == (np.float32, (64, 64))
        np.testing.assert_allclose(mask[:, :32], 0.2)
        assert (mask[:, 32:] == 1).all()
    assert path.stat().st_size < 4 * 8 * 8 * 4 + 4000  # the mask alone has 16,384 bytes unpacked
    assert "alpha_mask" in read_npz(pictures / "c_0064x0064_sdxl.npz")  # sd-scripts asks for one of every image


def test_a_mask_in_the_cache_is_not_used_when_it_is_switched_off(pictures: Path, family: FakeFamily, vae: FakeVae) -> None:
    cache(dataset_of(pictures, alpha_mask=True), family, vae)
    dataset = dataset_of(pictures, alpha_mask=False)
    report = cache(dataset, family, vae)
    assert dict(report.made) == {"transparent in another way": 2}  # white now; the JPEG stays
    assert report.kept == 1
    assert all(batch.masks is None for batch in make_loader(dataset, 1))


def test_switching_masks_on_makes_what_may_be_transparent_again(pictures: Path, family: FakeFamily, vae: FakeVae) -> None:
    cache(dataset_of(pictures, alpha_mask=False), family, vae)
    dataset = dataset_of(pictures, alpha_mask=True)
    report = cache(dataset, family, vae)
    assert dict(report.made) == {"transparent in another way": 2}
    assert mask_of(dataset, "a.png") is not None
    assert cache(dataset_of(pictures, alpha_mask=True), family, vae).kept == 3


def strip(path: Path, *without: str) -> None:
    """Make a file that sd-scripts could have written."""
    arrays = read_npz(path)
    np.savez(path, **{name: array for name, array in arrays.items() if not name.startswith("atelier") and name not in without})


def test_masks_of_sd_scripts_are_used_and_missing_ones_made(pictures: Path, family: FakeFamily, vae: FakeVae) -> None:
    cache(dataset_of(pictures, alpha_mask=True), family, vae)
    for path in pictures.glob("*.npz"):
        strip(path)
    dataset = dataset_of(pictures, alpha_mask=True)
    report = cache(dataset, family, vae)
    assert (report.foreign, dict(report.made)) == (3, {})
    assert float(mask_of(dataset, "a.png").min()) == pytest.approx(0.2)
    strip(pictures / "a_0064x0064_sdxl.npz", "alpha_mask")
    strip(pictures / "c_0064x0064_sdxl.npz", "alpha_mask")
    assert dict(cache(dataset_of(pictures, alpha_mask=True), family, vae).made) == {"without a mask yet": 1}


def test_caches_of_sd_scripts_are_not_used_for_what_is_really_transparent(pictures: Path, family: FakeFamily, vae: FakeVae) -> None:
    """They hold the colours that hide under it."""
    cache(dataset_of(pictures, alpha_mask=True), family, vae)
    for path in pictures.glob("*.npz"):
        strip(path)
    report = cache(dataset_of(pictures, alpha_mask=False), family, vae)
    assert (report.foreign, dict(report.made)) == (2, {"transparent in another way": 1})


def test_one_picture_at_two_sizes_has_two_masks_in_one_file(pictures: Path, family: FakeFamily, vae: FakeVae) -> None:
    sizes = [section(subset(pictures, alpha_mask=True), resolution=(side, side), batch_size=1) for side in (64, 32)]
    dataset = Dataset(config(*sizes), 1)
    cache(dataset, family, vae)
    assert {"alpha_mask", "alpha_mask_4x4"} <= read_npz(pictures / "a_0064x0064_sdxl.npz").keys()
    for batch in make_loader(dataset, 1):
        side = batch.latents.shape[-1] * 8
        assert batch.masks.shape == (1, side, side)
        if batch.image_keys[0].endswith("a.png"):
            assert torch.allclose(batch.masks[..., : side // 2], torch.tensor(0.2), atol=0.01)


def test_transparent_pictures_are_counted_unless_they_have_masks(pictures: Path) -> None:
    findings = Findings()
    build_index(config(section(subset(pictures))), findings)
    ((kind, count, _),) = findings.groups(Severity.WARNING)
    assert (kind, count) == (Kind.TRANSPARENT, 2)
    assert any("trained as white" in line for line in findings.lines(Severity.WARNING))
    masked = Findings()
    build_index(config(section(subset(pictures, alpha_mask=True))), masked)
    assert not list(masked.groups(Severity.WARNING))
