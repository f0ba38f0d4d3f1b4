"""Folders as people have them: damaged files of every kind, and names of every kind."""

from pathlib import Path

import pytest
import torch
from dataset_samples import FakeFamily, FakeVae, config, make_image, make_loader, section, subset

from library.dataset.dataset import Dataset
from library.dataset.latent_cache import cache_latents
from library.dataset.latent_encoder import LatentEncoder
from library.options.errors import UserError
from library.options.groups.cache import CacheOptions

NAMES = [
    "with spaces  and more",
    "it's \"quoted\"", "🦊 fox 画像 ünïcode", "a" * 196, "[brackets] {braces} *stars* 100%", "dots.in.the.name",
    "-dash", "$HOME `x`", "new\nline", "#comment",
]  # fmt: skip


def write_bad_files(folder: Path) -> list[str]:
    """Put damaged files beside the good ones and return their names."""
    for name in ("cut off.png", "cut off.jpg", "cut off.webp", "cut off.bmp", "cut off.avif"):
        path = make_image(folder / name, (200, 150))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (folder / "nothing 🕳.png").write_bytes(b"")
    (folder / "text.png").write_text("this is no picture")
    (folder / 'a page\'s "source".jpg').write_text("<html></html>")
    (folder / "zeros.webp").write_bytes(bytes(5000))
    make_image(folder / f"{'l' * 196}.png", (30_000, 2))
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    bad = ["nothing 🕳.png", "text.png", 'a page\'s "source".jpg', "zeros.webp", f"{'l' * 196}.png", "gone.png"]
    return bad + [f"cut off.{ending}" for ending in ("png", "jpg", "webp", "bmp", "avif")]


@pytest.mark.parametrize("bucketed", [False, True])
def test_every_bad_file_is_named_in_one_message(folder: Path, bucketed: bool) -> None:
    bad = write_bad_files(folder)
    for name in bad:
        (folder / name).with_suffix(".txt").write_text("caption")
    with pytest.raises(UserError) as caught:
        Dataset(config(section(subset(folder), enable_bucket=bucketed)), 1)
    told = str(caught.value)
    named = [name for name in bad if str(folder / name) in told]
    assert told.startswith(f"The dataset has {len(bad)} errors:")
    assert len(named) == len(bad) or f"and {len(bad) - len(named)} more" in told
    assert "im0.png" not in told


def test_each_bad_file_has_its_own_sentence(folder: Path) -> None:
    for name in write_bad_files(folder):
        alone = folder.parent / f"alone {abs(hash(name))}"
        alone.mkdir()
        (folder / name).rename(alone / name)
        (alone / name).with_suffix(".txt").write_text("caption")
        with pytest.raises(UserError) as caught:
            Dataset(config(section(subset(alone))), 1)
        assert str(alone / name) in str(caught.value)


def test_a_picture_that_stays_narrow_without_upscaling_is_named_too(folder: Path) -> None:
    make_image(folder / "strip.png", (30_000, 2))
    (folder / "strip.txt").write_text("a strip")
    with pytest.raises(UserError, match=r"strip\.png: it is 30000x2, which is too small or too narrow"):
        Dataset(config(section(subset(folder), enable_bucket=True, bucket_no_upscale=True)), 1)


def test_names_of_every_kind_are_trained_and_cached(tmp_path: Path, family: FakeFamily, vae: FakeVae) -> None:
    images = tmp_path / "folder [with] 'signs' 🦊"
    images.mkdir()
    for number, name in enumerate(NAMES):
        make_image(images / f"{name}.png", seed=number)
        (images / f"{name}.txt").write_text(f"caption {number}", encoding="utf-8")
    dataset = Dataset(config(section(subset(images))), 1)
    seen = {
        key: caption for batch in make_loader(dataset, 1) for key, caption in zip(batch.image_keys, batch.captions, strict=True)
    }
    assert seen == {str(images / f"{name}.png"): f"caption {number}" for number, name in enumerate(NAMES)}
    encoder = LatentEncoder(family, lambda: vae, torch.device("cpu"), torch.float32, 1)
    assert cache_latents(dataset, family, encoder, CacheOptions(cache_latents_to_disk=True)).made == {"new": len(NAMES)}
    assert len(list(make_loader(dataset, 1))) == len(NAMES) / 2
    again = Dataset(config(section(subset(images))), 1)
    assert cache_latents(again, family, encoder, CacheOptions(cache_latents_to_disk=True)).kept == len(NAMES)
