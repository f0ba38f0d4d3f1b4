"""Cached latents: what is kept, what is made again and why, and that sd-scripts' files are read and ours readable by it."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_samples import FakeFamily, FakeVae, config, make_image, make_loader, section, subset
from PIL import Image

from library.dataset import latent_cache, latent_encoder
from library.dataset.cache_stamps import CacheReport
from library.dataset.dataset import Dataset
from library.dataset.images import to_model_range
from library.dataset.latent_cache import cache_latents
from library.dataset.latent_encoder import LatentEncoder
from library.options.errors import UserError
from library.options.groups.cache import CacheOptions

DISK = CacheOptions(cache_latents_to_disk=True, vae_batch_size=2)
MEMORY = CacheOptions(cache_latents=True, vae_batch_size=2)


def dataset_of(folder: Path, seed: int = 1, sections: int = 1, **changes: Any) -> Dataset:
    values = {"enable_bucket": True} | changes
    rules = {name: values.pop(name) for name in ("flip_aug",) if name in values}
    resolutions = [{}, {"resolution": (96, 96)}][:sections]
    return Dataset(config(*(section(subset(folder, **rules), **(values | more)) for more in resolutions)), seed)


def cache(
    dataset: Dataset,
    family: FakeFamily,
    vae: FakeVae,
    options: CacheOptions = DISK,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> CacheReport:
    encoder = LatentEncoder(family, lambda: vae, torch.device("cpu"), dtype, dataset.seed, options.vae_batch_size)
    return cache_latents(dataset, family, encoder, options, **more)


def read_all(dataset: Dataset) -> list[torch.Tensor]:
    assert dataset.latents is not None
    return [dataset.latents.read(item, flipped=False) for item in dataset.items]


def as_sd_scripts_writes(path: Path, **changes: Any) -> None:
    """Strip what only we write, and change arrays."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files if not name.startswith("atelier")}
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def test_files_have_sd_scripts_names_keys_and_types(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    cache(dataset_of(folder, flip_aug=True), family, vae)
    assert (folder / "im3_0080x0060_sdxl.npz").exists()
    with np.load(folder / "im1_0096x0064_sdxl.npz", allow_pickle=False) as archive:
        assert set(archive.files) == {"latents", "latents_flipped", "original_size", "crop_ltrb", "atelier_stamp"}
        assert archive["latents"].dtype == np.float32
        assert archive["latents"].shape[0] == 4
        assert archive["original_size"].tolist() == [96, 64]
        assert archive["original_size"].dtype == np.int64
        assert archive["crop_ltrb"].dtype == np.float64


def test_a_second_run_encodes_nothing_and_gives_the_same(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    first, second = dataset_of(folder), dataset_of(folder, seed=2)
    assert cache(first, family, vae).made == {"new": 5}
    report = cache(second, family, vae)
    assert (report.kept, dict(report.made), vae.seen) == (5, {}, 5)
    assert report.sentence() == "Latents: 5 taken from the cache, nothing to encode."
    assert all(torch.equal(a, b) for a, b in zip(read_all(first), read_all(second), strict=True))


def test_memory_and_disk_hold_the_same_latents_whatever_the_batch_size(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    disk, memory = dataset_of(folder), dataset_of(folder)
    cache(disk, family, vae)
    cache(memory, family, vae, MEMORY.model_copy(update={"vae_batch_size": 1}))
    assert all(torch.equal(a, b) for a, b in zip(read_all(disk), read_all(memory), strict=True))


def test_the_latents_are_those_of_the_image_with_noise_of_seed_and_name(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    dataset = dataset_of(folder, flip_aug=True)
    cache(dataset, family, vae, MEMORY)
    with Image.open(folder / "im0.png") as image:
        pixels = torch.from_numpy(to_model_range(np.asarray(image)))
    clean = torch.nn.functional.avg_pool2d(pixels, 8)
    latents = dataset.latents.read(dataset.items[0], flipped=False)
    mirrored = dataset.latents.read(dataset.items[0], flipped=True)
    assert torch.allclose(latents[:3], clean, atol=0.06)
    assert torch.allclose(mirrored[:3], clean.flip(-1), atol=0.06)
    other = dataset_of(folder, seed=2)
    cache(other, family, vae, MEMORY)
    assert not torch.equal(latents, other.latents.read(other.items[0], flipped=False))


CHANGES: dict[str, tuple[Any, str, int]] = {
    "the image": (lambda folder, family: make_image(folder / "im0.png", (64, 64), seed=6), "of an image that changed", 1),
    "the vae": (lambda folder, family: family.fingerprints.update(vae="vae-2"), "of another VAE", 5),
    "a damaged file": (
        lambda folder, family: (folder / "im0_0064x0064_sdxl.npz").write_bytes(b"PK\x03\x04 broken"),
        "damaged",
        1,
    ),
    "a truncated file": (
        lambda folder, family: os.truncate(folder / "im0_0064x0064_sdxl.npz", 300),
        "damaged",
        1,
    ),
    "a deleted file": (lambda folder, family: (folder / "im0_0064x0064_sdxl.npz").unlink(), "new", 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_encoded_again_alone(folder: Path, family: FakeFamily, vae: FakeVae, change: str) -> None:
    cache(dataset_of(folder), family, vae)
    make, reason, count = CHANGES[change]
    make(folder, family)
    report = cache(dataset_of(folder), family, vae)
    assert dict(report.made) == {reason: count}
    assert report.kept == 5 - count
    assert f"{count} {reason}" in report.sentence()
    assert cache(dataset_of(folder), family, vae).kept == 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"resolution": (96, 96)}, "of another size"),
        ({"enable_bucket": False}, "of another size"),
        ({"resize_interpolation": "nearest"}, "resized in another way"),
        ({"flip_aug": True}, "not mirrored yet"),
    ],
)
def test_other_settings_make_entries_again(
    folder: Path, family: FakeFamily, vae: FakeVae, changes: dict[str, Any], reason: str
) -> None:
    cache(dataset_of(folder), family, vae)
    dataset = dataset_of(folder, **changes)
    assert set(cache(dataset, family, vae).made) == {reason}
    assert [tuple(latents.shape[-2:]) for latents in read_all(dataset)] == [
        (item.geometry.bucket[1] // 8, item.geometry.bucket[0] // 8) for item in dataset.items
    ]


def test_another_precision_makes_entries_again(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    cache(dataset_of(folder), family, vae)
    assert dict(cache(dataset_of(folder), family, vae, dtype=torch.bfloat16).made) == {"in another precision": 5}


def test_switching_flips_off_or_touching_the_image_keeps_entries(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    cache(dataset_of(folder, flip_aug=True), family, vae)
    os.utime(folder / "im0.png", (1, 1))
    assert cache(dataset_of(folder), family, vae).kept == 5


def test_one_folder_at_two_sizes_has_both_in_its_files(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    both = dataset_of(folder, sections=2)
    cache(both, family, vae)
    memory = dataset_of(folder, sections=2)
    cache(memory, family, vae, MEMORY)
    assert all(torch.equal(a, b) for a, b in zip(read_all(both), read_all(memory), strict=True))
    with np.load(folder / "im0_0064x0064_sdxl.npz") as archive:
        assert archive["latents"].shape == (4, 8, 8)
        assert archive["latents_12x12"].shape == (4, 12, 12)
    assert cache(dataset_of(folder, sections=2), family, vae).kept == 10
    (folder / "im0_0064x0064_sdxl.npz").unlink()
    assert cache(dataset_of(folder, sections=2), family, vae).made == {"new": 2}


def test_making_one_size_again_keeps_the_other(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    cache(dataset_of(folder, sections=2), family, vae)
    path = folder / "im0_0064x0064_sdxl.npz"
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(path, **(arrays | {"latents": arrays["latents"] * np.nan}))
    assert dict(cache(dataset_of(folder, sections=2), family, vae).made) == {"not finite": 1}
    assert cache(dataset_of(folder, sections=2), family, vae).kept == 10


def test_other_content_of_the_same_length_is_noticed(tmp_path: Path, family: FakeFamily, vae: FakeVae) -> None:
    images = tmp_path / "bmp"
    images.mkdir()
    length = make_image(images / "a.bmp").stat().st_size
    dataset = Dataset(config(section(subset(images, class_tokens=""))), 1)
    cache(dataset, family, vae)
    assert make_image(images / "a.bmp", seed=3).stat().st_size == length
    os.utime(images / "a.bmp", (1, 1))
    assert dict(cache(dataset, family, vae).made) == {"of an image that changed": 1}


def test_going_back_to_a_size_that_has_a_suffix_needs_no_encoding(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    cache(dataset_of(folder, sections=2), family, vae)
    assert cache(dataset_of(folder, resolution=(96, 96)), family, vae).kept == 5


def test_one_folder_seen_from_two_places_is_encoded_once(
    folder: Path, family: FakeFamily, vae: FakeVae, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    dataset = Dataset(config(section(subset(folder)), section(subset("images"))), 1)
    assert cache(dataset, family, vae).made == {"new": 5}
    assert len(read_all(dataset)) == 10


def test_one_image_resized_in_two_ways_does_not_fit_in_one_file(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    two = config(section(subset(folder)), section(subset(folder, resize_interpolation="nearest")))
    with pytest.raises(UserError, match=r"im0\.png is resized in two ways to 64x64"):
        cache(Dataset(two, 1), family, vae)
    cache(Dataset(two, 1), family, vae, MEMORY)


def test_files_of_sd_scripts_are_used_with_a_word_of_warning(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    cache(dataset_of(folder), family, vae)
    marked = np.full((4, 8, 8), 3, np.float32)
    for path in folder.glob("*.npz"):
        as_sd_scripts_writes(path, **({"latents": marked} if path.name.startswith("im0") else {}))
    dataset = dataset_of(folder)
    report = cache(dataset, family, vae)
    assert (report.kept, report.foreign) == (5, 5)
    assert "5 latent caches are from another program" in report.foreign_sentence()
    assert read_all(dataset)[0].unique().tolist() == [3]


def test_suffixed_keys_of_newer_sd_scripts_are_read(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    cache(dataset_of(folder), family, vae)
    path = folder / "im0_0064x0064_sdxl.npz"
    with np.load(path) as archive:
        arrays = {f"{name}_8x8": archive[name] for name in archive.files if not name.startswith("atelier")}
    np.savez(path, **arrays)
    report = cache(dataset_of(folder), family, vae)
    assert (report.kept, report.foreign) == (5, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"latents": np.zeros((4, 9, 8), np.float32)}, "of another size"),
        ({"latents": None}, "of another size"),
        ({"latents": np.full((4, 8, 8), np.nan, np.float32)}, "not finite"),
        ({"original_size": np.array([65, 64])}, "of another size"),
        ({"original_size": None}, "of another size"),
        ({"crop_ltrb": np.array([4.0, 0, 60, 64])}, "of another size"),
        ({"crop_ltrb": None}, "of another size"),
    ],
)
def test_files_of_sd_scripts_that_do_not_fit_are_made_again(
    folder: Path, family: FakeFamily, vae: FakeVae, changes: dict[str, Any], reason: str
) -> None:
    cache(dataset_of(folder), family, vae)
    as_sd_scripts_writes(folder / "im0_0064x0064_sdxl.npz", **changes)
    assert dict(cache(dataset_of(folder), family, vae).made) == {reason: 1}


def test_files_of_sd_scripts_older_than_the_image_are_made_again(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    cache(dataset_of(folder), family, vae)
    path = folder / "im0_0064x0064_sdxl.npz"
    as_sd_scripts_writes(path)
    os.utime(path, (1, 1))
    assert dict(cache(dataset_of(folder), family, vae).made) == {"of an image that changed": 1}


def test_a_stamp_does_not_vouch_for_arrays_another_program_put_in(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    cache(dataset_of(folder), family, vae)
    path = folder / "im0_0064x0064_sdxl.npz"
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(path, **(arrays | {"latents": arrays["latents"] * np.nan}))
    assert dict(cache(dataset_of(folder), family, vae).made) == {"not finite": 1}


def test_existing_files_are_trusted_when_asked_for_and_then_named_if_wrong(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    cache(dataset_of(folder), family, vae)
    dataset = dataset_of(folder, resolution=(96, 96))
    assert cache(dataset, family, vae, DISK.model_copy(update={"skip_cache_check": True})).kept == 5
    with pytest.raises(UserError, match=r"_sdxl\.npz does not hold the latents of .*im\d\.png at .*--skip_cache_check"):
        list(make_loader(dataset, 1))


@pytest.mark.parametrize("options", [DISK, MEMORY])
def test_latents_that_are_not_finite_stop_caching_with_the_name_and_the_way_out(
    folder: Path, family: FakeFamily, vae: FakeVae, options: CacheOptions
) -> None:
    vae.poison = True
    with pytest.raises(UserError, match=r"not finite for .*im\d\.png.*float16.*--no_half_vae"):
        cache(dataset_of(folder), family, vae, options, dtype=torch.float16)
    assert not list(folder.glob("*.npz"))


def test_what_was_written_before_an_interruption_is_kept(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    encode = family.encode_images

    def interrupted(*arguments: Any) -> torch.Tensor:
        if vae.seen == 3:
            raise KeyboardInterrupt
        return encode(*arguments)

    family.encode_images = interrupted
    with pytest.raises(KeyboardInterrupt):
        cache(dataset_of(folder), family, vae, DISK.model_copy(update={"vae_batch_size": 1}))
    family.encode_images = encode
    report = cache(dataset_of(folder), family, vae)
    assert (report.kept, report.made.total()) == (3, 2)
    assert {path.name for path in folder.glob(".*")} <= {".atelier_index.sqlite"}


def test_processes_share_the_files(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    shares = [
        cache(dataset_of(folder, sections=2), family, vae, process_index=rank, num_processes=2).made.total() for rank in (0, 1)
    ]
    assert shares == [6, 4]
    assert cache(dataset_of(folder, sections=2), family, vae).kept == 10


def test_an_image_set_upright_has_no_use_for_files_of_sd_scripts(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    exif = Image.Exif()
    exif[274] = 3
    with Image.open(folder / "im0.png") as image:
        image.save(folder / "im0.png", exif=exif)
    cache(dataset_of(folder), family, vae)
    as_sd_scripts_writes(folder / "im0_0064x0064_sdxl.npz")
    assert dict(cache(dataset_of(folder), family, vae).made) == {"turned in another way": 1}


@pytest.mark.parametrize("options", [DISK, MEMORY])
def test_batches_carry_cached_latents_mirrored_where_flipped(
    folder: Path, family: FakeFamily, vae: FakeVae, options: CacheOptions
) -> None:
    dataset, plain = dataset_of(folder, flip_aug=True), dataset_of(folder, flip_aug=True)
    cache(dataset, family, vae, options)
    for cached, live in zip(make_loader(dataset, 1, num_workers=2), make_loader(plain, 1), strict=True):
        assert cached.images is None
        pooled = torch.nn.functional.avg_pool2d(live.images, 8)
        assert torch.allclose(cached.latents[:, :3], pooled, atol=0.06)
        assert cached.latents.dtype == torch.float32
        assert torch.equal(cached.sizes.crop_top_left, live.sizes.crop_top_left)


def test_going_back_and_forth_between_sizes_encodes_each_once(folder: Path, family: FakeFamily, vae: FakeVae) -> None:
    assert cache(dataset_of(folder), family, vae).made == {"new": 5}
    assert cache(dataset_of(folder, resolution=(96, 96)), family, vae).made == {"of another size": 5}
    with np.load(folder / "im0_0064x0064_sdxl.npz") as archive:
        assert archive["latents"].shape == (4, 12, 12)  # what sd-scripts reads is the size that was cached last
        assert archive["latents_8x8"].shape == (4, 8, 8)
    assert cache(dataset_of(folder), family, vae).kept == 5
    assert cache(dataset_of(folder, resolution=(96, 96)), family, vae).kept == 5


@pytest.mark.parametrize("batch_size", [1, 2])
def test_images_are_decoded_and_written_while_the_vae_works(
    folder: Path, family: FakeFamily, vae: FakeVae, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    decoded: list[str] = []
    written: list[str] = []
    load, write, encode = latent_encoder.load_placed, latent_cache.write_npz, family.encode_images

    def decoding(path: str, *arguments: Any, **more: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        decoded.append(path)
        return load(path, *arguments, **more)

    def writing(*arguments: Any, **more: Any) -> None:
        write(*arguments, **more)
        written.append(arguments[0])

    def encoding(*arguments: Any) -> torch.Tensor:
        first = vae.seen == 0
        latents = encode(*arguments)
        end = time.monotonic() + 10
        while len(decoded) < (batch_size + 1 if first else 5) or len(written) < (0 if first else batch_size):
            assert time.monotonic() < end, "nothing goes on while the VAE works"
            time.sleep(0.001)
        return latents

    family.encode_images = encoding
    monkeypatch.setattr(latent_encoder, "load_placed", decoding)
    monkeypatch.setattr(latent_cache, "write_npz", writing)
    report = cache(dataset_of(folder, enable_bucket=False), family, vae, DISK.model_copy(update={"vae_batch_size": batch_size}))
    assert report.made == {"new": 5}
    assert len(written) == 5
