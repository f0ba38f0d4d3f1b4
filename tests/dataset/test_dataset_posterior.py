"""Latents drawn from a cached posterior: anew for each use, as if the images were encoded while training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_samples import POSTERIOR_STD, FakeFamily, FakeVae, config, make_loader, section, subset

from library.dataset.cache_stamps import CacheReport
from library.dataset.dataset import Dataset
from library.dataset.latent_cache import cache_latents
from library.dataset.latent_encoder import LatentEncoder
from library.diffusion.posterior import posterior_noise
from library.options.groups.cache import CacheOptions

DISK = CacheOptions(cache_latents_to_disk=True)
MEMORY = CacheOptions(cache_latents=True)


def dataset_of(folder: Path, **changes: Any) -> Dataset:
    return Dataset(config(section(subset(folder, flip_aug=True, num_repeats=3), enable_bucket=True, **changes)), 1)


def cache(dataset: Dataset, family: FakeFamily, options: CacheOptions, *, posterior: bool = True) -> CacheReport:
    vae = FakeVae()
    encoder = LatentEncoder(family, lambda: vae, torch.device("cpu"), torch.float32, seed=1, batch_size=2, posterior=posterior)
    return cache_latents(dataset, family, encoder, options)


@pytest.mark.parametrize("options", [DISK, MEMORY])
def test_every_use_gets_the_latents_that_encoding_in_the_step_would_give(
    folder: Path, family: FakeFamily, options: CacheOptions
) -> None:
    cached, live = dataset_of(folder), dataset_of(folder)
    cache(cached, family, options)
    seen: dict[tuple[str, bool], list[torch.Tensor]] = {}
    for epoch in (1, 2):
        for batch, images in zip(make_loader(cached, epoch, num_workers=2), make_loader(live, epoch), strict=True):
            assert batch.latents is not None
            assert images.images is not None
            expected = family.encode_images(FakeVae(), images.images, posterior_noise(batch.draw_seeds, batch.latents.shape[1:]))
            torch.testing.assert_close(batch.latents, expected, rtol=0, atol=1e-6)
            for key, image, latents in zip(batch.image_keys, images.images, batch.latents, strict=True):
                seen.setdefault((key, bool(image[0, 0, 0] > image[0, 0, -1])), []).append(latents)
    assert len(seen) == 10
    for draws in seen.values():
        assert all(0 < (draws[0] - other).std() < 3 * POSTERIOR_STD for other in draws[1:])
    again = [batch.latents for batch in make_loader(cached, 2)]
    assert all(torch.equal(one, other.latents) for one, other in zip(again, make_loader(cached, 2), strict=True))


def test_files_keep_a_sample_for_other_programs_beside_the_posterior(folder: Path, family: FakeFamily) -> None:
    cache(dataset_of(folder), family, DISK)
    with np.load(folder / "im1_0096x0064_sdxl.npz", allow_pickle=False) as archive:
        assert set(archive.files) == {
            "latents", "latents_flipped", "original_size", "crop_ltrb", "latents_posterior", "latents_flipped_posterior",
            "atelier_stamp",
        }  # fmt: skip
        sample, posterior = archive["latents"], archive["latents_posterior"]
    assert posterior.shape == (8, *sample.shape[1:])
    assert np.allclose(np.exp(posterior[4:] / 2), POSTERIOR_STD)
    assert 0 < np.abs(sample - posterior[:4]).std() < 2 * POSTERIOR_STD


def test_samples_are_the_same_with_and_without_the_posterior(folder: Path, family: FakeFamily) -> None:
    cache(dataset_of(folder), family, DISK)
    plain = dataset_of(folder)
    assert cache(plain, family, DISK, posterior=False).made == {}
    sampled = dataset_of(folder)
    cache(sampled, family, MEMORY, posterior=False)
    for item in plain.items:
        assert plain.latents is not None
        assert sampled.latents is not None
        torch.testing.assert_close(plain.latents.read(item, flipped=True), sampled.latents.read(item, flipped=True))


def test_entries_without_a_posterior_get_one(folder: Path, family: FakeFamily) -> None:
    cache(dataset_of(folder), family, DISK, posterior=False)
    assert cache(dataset_of(folder), family, DISK).made == {"without its posterior yet": 5}
    assert cache(dataset_of(folder), family, DISK).made == {}


def test_the_posteriors_of_two_sizes_lie_in_one_file(folder: Path, family: FakeFamily) -> None:
    for resolution in ((64, 64), (96, 96), (64, 64), (96, 96)):
        dataset = dataset_of(folder, resolution=resolution)
        cache(dataset, family, DISK)
        for batch in make_loader(dataset, 1):
            assert batch.latents is not None
    assert cache(dataset_of(folder), family, DISK).made == {}
