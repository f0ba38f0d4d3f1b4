"""The caching tools as a person runs them, on a tiny checkpoint and real photographs."""

import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.dataset.cache_stamps import read_stamp
from library.files.npz import read_npz
from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from tests.cli.training_commands import run_command, run_killed, run_processes

LATENTS, TEXTS = "tools/cache_latents.py", "tools/cache_text_encoder_outputs.py"


@pytest.fixture
def data(tmp_path: Path, photos: Path) -> Path:
    """Three photographs with captions, and the file that describes them."""
    images = tmp_path / "images"
    images.mkdir()
    for picture in sorted(path for path in photos.iterdir() if path.suffix != ".txt" and path.with_suffix(".txt").exists())[:3]:
        shutil.copy(picture, images)
        shutil.copy(picture.with_suffix(".txt"), images)
    file = tmp_path / "data.toml"
    file.write_text(
        f"[general]\nresolution = 128\nenable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 256\nbucket_reso_steps = 32\n"
        f'caption_extension = ".txt"\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{images}"\nflip_aug = true\n'
    )
    return file


def run(project_root: Path, script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_command([*map(str, arguments)], script=str(project_root / script))


@pytest.mark.parametrize(
    ("script", "ending", "keys", "name"),
    [
        (LATENTS, "_sdxl.npz", {"latents", "latents_flipped", "original_size", "crop_ltrb"}, "Latents"),
        (TEXTS, "_te_outputs.npz", {"hidden_state1", "hidden_state2", "pool2"}, "Captions"),
    ],
)
def test_a_cache_is_made_once_and_then_kept(
    project_root: Path, tiny_checkpoint: Path, data: Path, script: str, ending: str, keys: set[str], name: str
) -> None:
    arguments = ["--pretrained_model_name_or_path", tiny_checkpoint, "--dataset_config", data, "--seed", "1", "--sdxl"]
    first = run(project_root, script, *arguments)
    assert first.returncode == 0, first.stderr
    assert f"{name}: none in the cache, 3 encoded (3 new)." in first.stderr
    files = sorted((data.parent / "images").glob(f"*{ending}"))
    assert len(files) == 3
    with np.load(files[0], allow_pickle=False) as archive:
        assert keys <= set(archive.files)
    second = run(project_root, script, *arguments)
    assert second.returncode == 0, second.stderr
    assert f"{name}: 3 taken from the cache, nothing to encode." in second.stderr


def test_without_a_seed_two_runs_make_the_same_latents_and_say_nothing_of_seeds(
    project_root: Path, tiny_checkpoint: Path, data: Path
) -> None:
    made = []
    for _ in range(2):
        done = run(project_root, LATENTS, "--pretrained_model_name_or_path", tiny_checkpoint, "--dataset_config", data)
        assert done.returncode == 0 and "seed" not in done.stderr, done.stderr
        (path, *_) = files = sorted((data.parent / "images").glob("*_sdxl.npz"))
        made.append(next(array for name, array in read_npz(path).items() if name.startswith("latents_") and array.ndim == 3))
        for file in files:
            file.unlink()
    assert np.array_equal(*made)


def test_the_encoded_texts_are_the_processed_captions(project_root: Path, tiny_checkpoint: Path, data: Path) -> None:
    fixed = 'caption_prefix = "P,"\ncaption_suffix = ", {x|y}"\n'
    varying = "enable_wildcard = true\nshuffle_caption = true\ncaption_dropout_rate = 0.1\n"
    data.write_text(data.read_text().replace("flip_aug = true\n", fixed + varying))
    for path in (data.parent / "images").glob("*.txt"):
        path.write_text("one, {two|three}\nfour, five, six\n")
    options = ["--pretrained_model_name_or_path", tiny_checkpoint, "--dataset_config", data, "--text_cache_variants", "2"]
    done = run(project_root, TEXTS, *options)
    assert done.returncode == 0, done.stderr
    family = SdxlFamily.open(ModelSource(str(tiny_checkpoint)))
    encoders = family.load_text_encoders(torch.float32, torch.device("cpu"))
    files = sorted((data.parent / "images").glob("*_te_outputs.npz"))
    assert len(files) == 4
    seen: set[str] = set()
    for path in files:
        arrays, stamp = read_npz(path), read_stamp(str(path))
        assert stamp is not None
        for position, text in enumerate([stamp["caption"], *stamp["variants"]]):
            expected = family.text_cache.pack({k: v[0] for k, v in family.encode_text(family.tokenize([text]), encoders).items()})
            for name, array in expected.items():
                np.testing.assert_allclose(arrays[name + (f"_variant{position}" if position else "")], array, atol=1e-5)
            seen.add(text)
    assert "" in seen
    tags = [sorted(text.split(", ")) for text in seen - {""}]
    assert len(tags) > 3
    lines = (["one", "two"], ["one", "three"], ["five", "four", "six"])
    assert all(each in [sorted(["P", end, *line]) for line in lines for end in "xy"] for each in tags)


def test_caches_of_a_metadata_file_are_those_of_the_folder_where_captions_are_the_same(
    project_root: Path, tiny_checkpoint: Path, data: Path
) -> None:
    images = data.parent / "images"
    captions = {path.stem: {"tags": path.read_text(encoding="utf-8").splitlines()[0]} for path in images.glob("*.txt")}
    (data.parent / "meta.json").write_text(json.dumps(captions))
    options = ["--pretrained_model_name_or_path", tiny_checkpoint, "--seed", "1", "--sdxl"]
    described = ["--in_json", data.parent / "meta.json", "--train_data_dir", images, "--resolution", "128", "--flip_aug"]
    sizes = ["--enable_bucket", "--min_bucket_reso", "64", "--max_bucket_reso", "256", "--bucket_reso_steps", "32"]
    for script, name in ((LATENTS, "Latents"), (TEXTS, "Captions")):
        first = run(project_root, script, *options, *described, *sizes)
        assert first.returncode == 0, first.stderr
        assert f"{name}: none in the cache, 3 encoded (3 new)." in first.stderr
        second = run(project_root, script, *options, "--dataset_config", data)
        assert f"{name}: 3 taken from the cache, nothing to encode." in second.stderr, second.stderr


@pytest.mark.parametrize("script", [LATENTS, TEXTS])
def test_mistakes_in_options_and_dataset_are_told_together_at_once(project_root: Path, data: Path, script: str) -> None:
    data.write_text(data.read_text().replace("flip_aug", "flipp_aug"))
    start = time.monotonic()
    result = run(project_root, script, "--pretrained_model_name_or_path", "x", "--dataset_config", data, "--vae_batchsize", "2")
    assert result.returncode == 2
    assert "vae_batch_size" in result.stderr
    assert "unknown key flipp_aug. Did you mean flip_aug?" in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - start < 5


def test_a_corrupt_image_among_many_ends_the_run_by_name(project_root: Path, tiny_checkpoint: Path, data: Path) -> None:
    picture = next(path for path in sorted((data.parent / "images").iterdir()) if path.suffix != ".txt")
    os.truncate(picture, picture.stat().st_size // 2)
    result = run(project_root, LATENTS, "--pretrained_model_name_or_path", tiny_checkpoint, "--dataset_config", data)
    assert result.returncode == 1
    assert "The dataset has an error:" in result.stderr
    assert f"{picture} cannot be read" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((data.parent / "images").glob("*.npz"))


def many_images(data: Path, count: int) -> Path:
    """Put many small pictures where the photographs were; returns their folder."""
    images = data.parent / "images"
    for path in images.iterdir():
        path.unlink()
    for number in range(count):
        Image.new("RGB", (96 + 32 * (number % 2), 96), (number % 256, 100, 50)).save(images / f"im{number:03d}.png")
        (images / f"im{number:03d}.txt").write_text(f"picture {number}, colour\n")
    return images


@pytest.mark.parametrize(("script", "name", "ending"), [(LATENTS, "Latents", "_sdxl.npz"), (TEXTS, "Captions", "_te_outputs.npz")])
def test_two_processes_share_the_work_and_tell_of_it_together(
    project_root: Path, tiny_checkpoint: Path, data: Path, script: str, name: str, ending: str
) -> None:
    images = many_images(data, 5)
    options = ["--pretrained_model_name_or_path", str(tiny_checkpoint), "--dataset_config", str(data)]
    done = run_processes(options, str(project_root / script))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"{name}: none in the cache, 5 encoded (5 new).") == 1
    assert "(process 1 of 2)" in done.stderr
    assert len(list(images.glob(f"*{ending}"))) == 5


def test_a_killed_run_continues_where_it_was(project_root: Path, tiny_checkpoint: Path, data: Path) -> None:
    images = many_images(data, 60)
    arguments = ["--pretrained_model_name_or_path", str(tiny_checkpoint), "--dataset_config", str(data)]
    run_killed(arguments, str(project_root / LATENTS), when=lambda: len(list(images.glob("*.npz"))) >= 3)
    written = len(list(images.glob("*.npz")))
    assert 3 <= written < 60
    done = run(project_root, LATENTS, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"Latents: {written} taken from the cache, {60 - written} encoded ({60 - written} new)." in done.stderr


def test_two_programs_that_cache_one_folder_at_once_leave_it_whole(project_root: Path, tiny_checkpoint: Path, data: Path) -> None:
    images = many_images(data, 16)
    other = data.with_name("other.toml")
    other.write_text(data.read_text().replace("resolution = 128", "resolution = 64"))
    model = ["--pretrained_model_name_or_path", tiny_checkpoint, "--dataset_config"]
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda config: run(project_root, LATENTS, *model, config), (data, other)):
            assert done.returncode == 0, done.stderr
    for path in images.glob("*.npz"):
        shapes = {array.shape for name, array in read_npz(path).items() if name.startswith("latents") and array.ndim == 3}
        assert len(shapes) == 2
    assert len(list(images.glob("*.npz"))) == 16
    assert not [path for path in images.iterdir() if path.suffix == ".tmp"]
