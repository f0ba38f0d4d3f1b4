"""The caching tools as a person runs them, on a tiny checkpoint and real photographs."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

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
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(
        command, cwd=project_root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )


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
    assert "One file cannot be used:" in result.stderr
    assert f"{picture} cannot be read" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((data.parent / "images").glob("*.npz"))
