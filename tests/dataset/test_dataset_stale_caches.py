"""What makes cached latents and text stale: each change encodes exactly what it concerns, and the summary names the reason."""

import errno
import io
import os
import pkgutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_samples import FakeFamily, FakeVae, config, make_image, make_loader, section, subset
from PIL import Image

from library.dataset.cache_stamps import CacheReport
from library.dataset.dataset import Dataset
from library.dataset.latent_cache import cache_latents
from library.dataset.latent_encoder import LatentEncoder
from library.dataset.text_cache import cache_text_outputs
from library.dataset.text_encoder import TextEncoder
from library.options.errors import UserError
from library.options.groups.cache import CacheOptions

SECTION = ("resolution", "enable_bucket", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
TO_DISK = CacheOptions(cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True, vae_batch_size=2)


@dataclass
class Run:
    """A start of training on a folder, up to where everything is cached."""

    folder: Path
    family: FakeFamily = field(default_factory=FakeFamily)
    vae: FakeVae = field(default_factory=FakeVae)
    dtype: torch.dtype = torch.float32
    settings: dict[str, Any] = field(default_factory=lambda: {"enable_bucket": True})
    num_encoded: tuple[int, int] = (0, 0)
    """Images and texts of the last start."""

    def dataset(self) -> Dataset:
        """Index the folder as it is now."""
        outer = {name: self.settings[name] for name in SECTION if name in self.settings}
        inner = {name: value for name, value in self.settings.items() if name not in SECTION}
        return Dataset(config(section(subset(self.folder, **inner), **outer)), 1)

    def encode_images(self, dataset: Dataset) -> CacheReport:
        """Fill the cache of latents."""
        self.cached = dataset
        images = LatentEncoder(self.family, lambda: self.vae, torch.device("cpu"), self.dtype, seed=1, batch_size=2)
        return cache_latents(dataset, self.family, images, TO_DISK)

    def start(self) -> tuple[CacheReport, CacheReport]:
        """Fill both caches, load an epoch from them, and tell what was done."""
        dataset, cpu = self.dataset(), torch.device("cpu")
        texts = TextEncoder(self.family, lambda: [None], cpu, self.dtype, self.family.max_token_length, batch_size=2)
        reports = self.encode_images(dataset), cache_text_outputs(dataset, texts, TO_DISK, trust_foreign=True)
        self.num_encoded = self.vae.seen, len(self.family.encoded_texts)
        for batch, live in zip(make_loader(dataset, 1), make_loader(self.dataset(), 1), strict=True):
            assert batch.latents is not None
            assert live.images is not None
            assert batch.text_cond is not None
            pooled = torch.nn.functional.avg_pool2d(live.images, 8)
            assert torch.allclose(batch.latents[:, :3], pooled, atol=0.06)
            expected = self.family.encode_text(self.family.tokenize(live.captions), [])
            assert all(torch.equal(batch.text_cond[name], expected[name]) for name in expected)
        self.vae.seen = 0
        self.family.encoded_texts.clear()
        return reports


@pytest.fixture
def run(folder: Path) -> Run:
    """Five images of four shapes, everything cached once."""
    first = Run(folder)
    first.start()
    return first


def replace_by_another_size(run: Run) -> None:
    make_image(run.folder / "im0.png", (96, 96), seed=3)


def turn(run: Run) -> None:
    exif = Image.Exif()
    exif[274] = 3
    with Image.open(run.folder / "im0.png") as image:
        image.save(run.folder / "im0.png", exif=exif)


def settings(**changes: Any) -> Callable[[Run], None]:
    return lambda run: run.settings.update(changes)


ROWS: dict[str, tuple[Callable[[Run], Any], dict[str, int], dict[str, int]]] = {
    "nothing": (lambda run: None, {}, {}),
    "image edited": (lambda run: make_image(run.folder / "im0.png", seed=6), {"of an image that changed": 1}, {}),
    "image of another size": (replace_by_another_size, {"new": 1}, {}),
    "image added": (lambda run: make_image(run.folder / "new.png"), {"new": 1}, {"new": 1}),
    "resolution": (settings(resolution=(96, 96)), {"of another size": 5}, {}),
    "buckets off": (settings(enable_bucket=False), {"of another size": 1}, {}),
    "no upscaling": (settings(bucket_no_upscale=True), {"of another size": 4}, {}),
    "smaller buckets": (settings(max_bucket_reso=64), {"of another size": 3}, {}),
    "finer buckets": (settings(bucket_reso_steps=16), {"of another size": 3}, {}),
    "another VAE": (lambda run: run.family.fingerprints.update(vae="other"), {"of another VAE": 5}, {}),
    "other text encoders": (
        lambda run: run.family.fingerprints.update(text_encoders="other"), {}, {"of other text encoders": 5}),
    "interpolation": (settings(resize_interpolation="nearest"), {"resized in another way": 5}, {}),
    "flips on": (settings(flip_aug=True), {"not mirrored yet": 5}, {}),
    "caption edited": (
        lambda run: (run.folder / "im2.txt").write_text("other\n"), {}, {"of a caption that changed": 1}),
    "prefix": (settings(caption_prefix="P"), {}, {"of a caption that changed": 5}),
    "suffix": (settings(caption_suffix="S"), {}, {"of a caption that changed": 5}),
    "wildcards in one caption": (
        lambda run: (run.folder / "im2.txt").write_text("{x|x}\n") and run.settings.update(enable_wildcard=True),
        {}, {"of a caption that changed": 1}),
    "separator": (settings(secondary_separator=" 1"), {}, {"of a caption that changed": 1}),
    "token length": (
        lambda run: setattr(run.family, "max_token_length", 150), {}, {"of another --max_token_length": 5}),
    "precision": (
        lambda run: setattr(run, "dtype", torch.bfloat16), {"in another precision": 5}, {"in another precision": 5}),
    "turned by the camera": (turn, {"turned in another way": 1}, {}),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_a_change_encodes_exactly_what_it_concerns(run: Run, row: str) -> None:
    change, latents, texts = ROWS[row]
    before = {item.path: (item.size, item.geometry) for item in run.dataset().items}
    change(run)
    now = {item.path: (item.size, item.geometry) for item in run.dataset().items}
    moved = [path for path in now if path in before and now[path][0] == before[path][0] and now[path] != before[path]]
    assert len(moved) == latents.get("of another size", 0)
    images, captions = run.start()
    assert images.made == latents
    assert captions.made == texts
    assert run.num_encoded == (images.made.total() * (2 if "flips" in row else 1), captions.made.total())
    for report in (images, captions):
        assert all(f"{count} {reason}" in report.sentence() for reason, count in report.made.items())
    images, captions = run.start()
    assert (images.made, captions.made) == ({}, {})


def test_switching_back_off_what_was_cached_encodes_nothing_and_has_no_effect(run: Run) -> None:
    run.settings["flip_aug"] = True
    run.start()
    run.settings["flip_aug"] = False
    images, captions = run.start()
    assert (images.made, captions.made) == ({}, {})


def test_a_mask_is_encoded_where_it_is_asked_for_and_not_used_where_it_is_not(run: Run) -> None:
    with Image.open(run.folder / "im1.png") as image:
        image.convert("RGBA").save(run.folder / "im1.png")
    assert run.start()[0].made == {"transparent in another way": 1}
    run.settings["alpha_mask"] = True
    assert run.start()[0].made == {"transparent in another way": 1}
    assert any(batch.masks is not None for batch in make_loader(run.cached, 1))
    run.settings["alpha_mask"] = False
    run.start()
    assert all(batch.masks is None for batch in make_loader(run.cached, 1))


LATENTS, TEXTS = "im0_0064x0064_sdxl.npz", "im0_te_outputs.npz"


def save(path: Path, **arrays: Any) -> None:
    """Write as sd-scripts does: without a note on what the arrays were made from."""
    with np.load(path) as archive:
        kept = {name: archive[name] for name in archive.files if not name.startswith("atelier")}
    np.savez(path, **{name: array for name, array in (kept | arrays).items() if array is not None})


def as_text(path: Path) -> None:
    path.write_text("no archive")


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def changed(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: save(path, **arrays)


FULL = np.zeros((4, 8, 8), np.float32)
BROKEN_LATENTS: dict[str, Callable[[Path], None]] = {
    "empty": cut(0),
    "text": as_text,
    "cut at 1 %": cut(0.01),
    "cut in the middle": cut(0.5),
    "last byte missing": lambda path: os.truncate(path, path.stat().st_size - 1),
    "not finite": changed(latents=FULL * np.nan),
    "infinite in one place": changed(latents=np.where(np.arange(8) == 3, np.inf, FULL).astype(np.float32)),
    "of another shape": changed(latents=np.zeros((4, 8, 4), np.float32)),
    "with other channels": changed(latents=np.zeros((16, 8, 8), np.float32)),
    "flat": changed(latents=np.zeros(256, np.float32)),
    "whole numbers": changed(latents=np.zeros((4, 8, 8), np.int64)),
    "words": changed(latents=np.full((4, 8, 8), "word")),
    "other names": changed(latents=None, latent=FULL),
    "no sizes": changed(original_size=None),
    "odd sizes": changed(original_size=np.array(["a", "b"])),
    "no crop": changed(crop_ltrb=None),
    "crop in words": changed(crop_ltrb=np.array(["a"] * 4)),
    "another crop": changed(crop_ltrb=np.array([0.0, 1.0, 8.0, 8.0])),
    "objects": lambda path: np.savez(path, latents=np.array([{"a": 1}], dtype=object)),
}
BROKEN_TEXTS: dict[str, Callable[[Path], None]] = {
    **{name: BROKEN_LATENTS[name] for name in ("empty", "text", "cut at 1 %", "cut in the middle", "last byte missing", "objects")},
    "not finite": changed(pool2=np.full(5, np.nan, np.float32)),
    "other names": changed(pool2=None, pool=np.zeros(5, np.float32)),
    "of another length": changed(hidden_state1=np.zeros((152, 3), np.float32)),
    "words": changed(pool2=np.full(5, "word")),
}


@pytest.mark.parametrize("damage", BROKEN_LATENTS)
def test_latents_that_cannot_be_right_are_made_again(run: Run, damage: str) -> None:
    BROKEN_LATENTS[damage](run.folder / LATENTS)
    images, captions = run.start()
    assert (images.made.total(), captions.made.total()) == (1, 0)
    assert run.start()[0].made == {}


@pytest.mark.parametrize("damage", BROKEN_TEXTS)
def test_texts_that_cannot_be_right_are_made_again(run: Run, damage: str) -> None:
    BROKEN_TEXTS[damage](run.folder / TEXTS)
    images, captions = run.start()
    assert (images.made.total(), captions.made.total()) == (0, 1)
    assert run.start()[1].made == {}


def test_a_file_cut_off_anywhere_is_made_again(run: Run) -> None:
    for name in (LATENTS, TEXTS):
        whole = (run.folder / name).read_bytes()
        for length in range(0, len(whole), len(whole) // 20):
            (run.folder / name).write_bytes(whole[:length])
            assert sum(report.made.total() for report in run.start()) == 1


@pytest.mark.parametrize("suffix", ["", "_8x8"])
def test_both_forms_of_files_of_sd_scripts_are_read(run: Run, suffix: str) -> None:
    marked = np.full((4, 8, 8), 3, np.float32)
    path = run.folder / LATENTS
    save(path, latents=marked)
    with np.load(path) as archive:
        np.savez(path, **{name + suffix: archive[name] for name in archive.files})
    images = run.encode_images(run.dataset())
    assert (images.made, images.foreign) == ({}, 1)
    latents, item = run.cached.latents, run.cached.items[0]
    assert latents is not None
    assert latents.read(item, flipped=False).unique().tolist() == [3]


def test_of_a_file_of_another_program_only_what_is_used_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run.folder / LATENTS
    save(path, latents_flipped=np.full((4, 8, 8), np.nan, np.float32))
    decoded: list[str] = []
    monkeypatch.setattr("library.dataset.latent_check.is_transparent", lambda image: bool(decoded.append(image)))
    report = run.encode_images(run.dataset())
    assert (report.foreign, report.made, decoded) == (1, {}, [])  # what is not read hinders nobody
    run.settings["flip_aug"] = True
    assert run.encode_images(run.dataset()).made == {"not mirrored yet": 4, "not finite": 1}


def hashed_and_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Start again; return the images that are hashed and the caches that are read."""
    hashed: list[str] = []
    read: list[str] = []
    with monkeypatch.context() as patch:
        for module, name, noted in (
            ("cache_stamps", "sha256_file", hashed), ("latent_check", "read_npz", read), ("latent_check", "read_stamps", read),
            ("text_cache", "read_npz", read), ("text_cache", "read_stamp", read),
        ):  # fmt: skip
            place = f"library.dataset.{module}.{name}"
            real = pkgutil.resolve_name(place)
            patch.setattr(
                place,
                lambda path, *args, real=real, noted=noted, **more: noted.append(Path(path).name) or real(path, *args, **more),
            )
        images, captions = run.start()
    assert (images.made, captions.made) == ({}, {})
    return hashed, read


def test_images_whose_time_alone_differs_are_hashed_once_for_each_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    image = run.folder / "im0.png"
    for seconds in (1, 2):
        os.utime(image, (seconds, seconds))
        assert hashed_and_read(run, monkeypatch)[0] == ["im0.png"]
        assert hashed_and_read(run, monkeypatch)[0] == []
    make_image(image, seed=9)
    os.utime(image, (2, 2))  # of the time that was seen, but of another length
    assert run.start()[0].made == {"of an image that changed": 1}


def test_accepted_files_of_other_programs_are_opened_again_only_when_they_or_what_is_wanted_changes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run.folder / LATENTS)
    save(run.folder / TEXTS)
    assert set(hashed_and_read(run, monkeypatch)[1]) >= {LATENTS, TEXTS}
    assert {LATENTS, TEXTS}.isdisjoint(hashed_and_read(run, monkeypatch)[1])
    save(run.folder / LATENTS)
    assert LATENTS in hashed_and_read(run, monkeypatch)[1]
    run.settings["caption_prefix"] = "P"
    images, captions = run.start()
    assert (images.made, images.foreign, captions.made) == ({}, 1, {"of a caption that changed": 5})
    make_image(run.folder / "im0.png", seed=9)
    assert run.start()[0].made == {"of an image that changed": 1}


def test_a_transparent_image_is_only_decoded_for_a_file_that_fits_otherwise(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    image, path = run.folder / "im0.png", run.folder / LATENTS
    Image.new("RGBA", (64, 64), (9, 9, 9, 99)).save(image)
    decoded: list[str] = []
    monkeypatch.setattr("library.dataset.latent_check.is_transparent", lambda image: not decoded.append(image))
    save(path)
    os.utime(path, (1, 1))
    assert (run.encode_images(run.dataset()).made, decoded) == ({"of an image that changed": 1}, [])
    save(path)
    assert (run.encode_images(run.dataset()).made, decoded) == ({"transparent in another way": 1}, [str(image)])


@pytest.mark.parametrize("suffix", ["", "_8x8"])
def test_files_of_sd_scripts_of_another_size_or_older_than_the_image_are_not(run: Run, suffix: str) -> None:
    path = run.folder / LATENTS
    save(path, latents=np.zeros((4, 4, 4), np.float32))
    with np.load(path) as archive:
        np.savez(path, **{name + suffix: archive[name] for name in archive.files})
    assert run.start()[0].made == {"of another size": 1}
    save(path)
    os.utime(path, (1, 1))
    assert run.start()[0].made == {"of an image that changed": 1}


def test_latents_of_older_models_are_never_used(run: Run) -> None:
    np.savez(run.folder / "im0.npz", latents=np.full((4, 8, 8), 3, np.float32), original_size=[64, 64], crop_ltrb=[0, 0, 64, 64])
    (run.folder / LATENTS).unlink()
    before = (run.folder / "im0.npz").read_bytes()
    assert run.start()[0].made == {"new": 1}
    assert (run.folder / "im0.npz").read_bytes() == before


def test_images_that_share_a_name_or_its_beginning_have_caches_of_their_own(tmp_path: Path) -> None:
    images = tmp_path / "twins"
    images.mkdir()
    for seed, name in enumerate(("a.png", "a.webp", "a.jpg", "a_b.png", "a_b_0064x0064.png", "a [1].png")):
        make_image(images / name, seed=seed)
        (images / name).with_suffix(".txt").write_text(f"{Path(name).stem}\n")
    run = Run(images)
    assert [report.made for report in run.start()] == [{"new": 6}, {"new": 6}]
    assert [report.made for report in run.start()] == [{}, {}]
    assert len(list(images.glob("*_sdxl.npz"))) == 6


@pytest.mark.parametrize("on_disk", [True, False])
def test_an_image_named_like_the_cache_of_another_is_trained_on_its_own_latents(tmp_path: Path, on_disk: bool) -> None:
    images = tmp_path / "twins"
    images.mkdir()
    names = ["a.png", "a.webp", "a.webp.png", "a.webp.png.jpg"]
    for seed, name in enumerate(names):
        make_image(images / name, seed=seed)
    run = Run(images)
    dataset = run.dataset()
    assert [Path(item.cache_stem).name for item in dataset.items] == ["a", "a.webp", "a.webp.png", "a.webp.png.jpg"]
    encoder = LatentEncoder(run.family, lambda: run.vae, torch.device("cpu"), run.dtype, seed=1, batch_size=2)
    options = TO_DISK if on_disk else CacheOptions(cache_latents=True)
    assert cache_latents(dataset, run.family, encoder, options).made.total() == 4
    assert dataset.latents is not None
    assert len({dataset.latents.read(item, flipped=False).numpy().tobytes() for item in dataset.items}) == 4


def test_a_lone_image_with_two_endings_has_the_cache_of_sd_scripts(tmp_path: Path) -> None:
    images = tmp_path / "twins"
    images.mkdir()
    for name in ("a.webp", "a.webp.png", "b.jpg", "b.png"):
        make_image(images / name)
    assert [Path(item.cache_stem).name for item in Run(images).dataset().items] == ["a", "a.webp", "b", "b.png"]


def test_an_image_of_another_length_is_another_whatever_its_time(run: Run) -> None:
    path = run.folder / "im0.png"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with path.open("ab") as file:
        file.write(b"more")  # behind the picture, which stays as it is
    os.utime(path, ns=times)
    assert run.encode_images(run.dataset()).made == {"of an image that changed": 1}


def test_two_datasets_that_differ_in_their_masks_alone_are_told_of_the_masks(tmp_path: Path) -> None:
    images = tmp_path / "glass"
    images.mkdir()
    Image.new("RGBA", (64, 64), (9, 9, 9, 99)).save(images / "a.png")
    masked, white = (Dataset(config(*(section(subset(images, alpha_mask=mask)) for mask in masks)), 1)
                     for masks in ((True, False), (False, False)))  # fmt: skip
    with pytest.raises(UserError, match=r"a\.png is wanted at 64x64 with its transparency as a mask and .* \(alpha_mask\), but "):
        Run(images).encode_images(masked)
    assert Run(images).encode_images(white).made == {"new": 1}
    resized = Dataset(config(*(section(subset(images, resize_interpolation=how)) for how in ("nearest", "area"))), 1)
    with pytest.raises(UserError, match=r"a\.png is resized in two ways to 64x64"):
        Run(images).encode_images(resized)


def test_a_checked_file_is_opened_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    class Watched(zipfile.ZipFile):
        def __init__(self, file: Any, *arguments: Any, **more: Any) -> None:
            opened.append(str(file))
            super().__init__(file, *arguments, **more)

    monkeypatch.setattr("library.dataset.cache_stamps.zipfile.ZipFile", Watched)
    assert run.encode_images(run.dataset()).kept == 5
    assert len(opened) == len(set(opened)) == 5


def test_files_are_checked_a_part_at_a_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.dataset.latent_cache._CHECKED_AT_ONCE", 2)
    for name in ("im1.png", "im4.png"):
        make_image(run.folder / name, seed=77)
    report = run.encode_images(run.dataset())
    assert (report.kept, report.made.total()) == (3, 2)


def test_one_folder_at_two_resolutions_has_both(run: Run) -> None:
    two = config(*(section(subset(run.folder), resolution=size, enable_bucket=True) for size in ((64, 64), (96, 96))))
    dataset = Dataset(two, 1)
    assert run.encode_images(dataset).made == {"of another size": 5}
    sizes = {latents.shape[-1] for batch in make_loader(dataset, 1) if (latents := batch.latents) is not None}
    assert len(sizes) > 1
    assert run.encode_images(Dataset(two, 1)).made == {}
    assert run.start()[0].made == {}


def test_two_programs_that_cache_two_sizes_at_once_lose_none(run: Run) -> None:
    squares = (64, 96, 128)
    runs = [Run(run.folder, settings={"resolution": (side, side), "enable_bucket": False}) for side in squares]
    assert {item.geometry.bucket for each in runs for item in each.dataset().items} == {(side, side) for side in squares}
    with ThreadPoolExecutor(len(runs)) as pool:
        reports = list(pool.map(lambda each: each.encode_images(each.dataset()), runs))
    assert [report.made.total() + report.kept for report in reports] == [5] * 3
    assert [report.made.total() for report in reports[1:]] == [5] * 2  # sizes that nobody else makes
    assert [each.encode_images(each.dataset()).made for each in (run, *runs)] == [{}] * 4


def test_a_full_disk_ends_caching_with_a_sentence_and_keeps_what_was_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = 3

    def filling(file: Any, array: Any, **more: Any) -> None:
        if not isinstance(file, io.BytesIO) and len(list(folder.glob("*.npz"))) >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_array(file, array, **more)

    write_array = np.lib.format.write_array
    first = Run(folder)
    monkeypatch.setattr("library.files.npz.np.lib.format.write_array", filling)
    with pytest.raises(UserError, match=r"im\d_\d+x\d+_sdxl\.npz could not be written: the disk is full\. Free some space"):
        first.start()
    room = 100
    assert first.encode_images(first.dataset()).kept == 3
    room = 7
    with pytest.raises(UserError, match=r"im\d_te_outputs\.npz could not be written: the disk is full"):
        first.start()
    room = 100
    images, captions = first.start()
    assert (images.kept, captions.kept) == (5, 2)
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
