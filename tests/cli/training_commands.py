"""What the tests of training commands share: a small dataset, command lines, and ways to run them."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "sdxl_train_network.py")
FINETUNE = str(ROOT / "sdxl_train.py")

DATASET = """
[general]
resolution = 64
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 32
caption_extension = ".txt"
shuffle_caption = true
caption_tag_dropout_rate = 0.2
flip_aug = true

[[datasets]]
batch_size = {batch_size}

[[datasets.subsets]]
image_dir = "{images}"
num_repeats = {repeats}
"""


def write_dataset(folder: Path, photos: Path, *, batch_size: int = 2, repeats: int = 1, count: int = 5) -> Path:
    """Copy some of the photographs, small, and describe them in a dataset file."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for path in sorted(photos.glob("*.jpg"))[:count]:
        with Image.open(path) as image:
            image.resize((image.width // 4, image.height // 4)).save(images / path.name)
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        (images / path.name).with_suffix(".txt").write_text(caption.strip() + ", photo, outdoors, bright", encoding="utf-8")
    config = folder / "dataset.toml"
    config.write_text(DATASET.format(batch_size=batch_size, repeats=repeats, images=images.as_posix()), encoding="utf-8")
    return config


def arguments(checkpoint: Path, dataset: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of a small run; later ones win over earlier ones."""
    return [
        "--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(dataset),
        "--output_dir", str(output), "--output_name", "net", "--network_module", "networks.lora", "--network_dim", "4",
        "--network_dropout", "0.1", "--learning_rate", "1e-3", "--max_train_steps", "6", "--seed", "11",
        "--max_data_loader_n_workers", "0", *more,
    ]  # fmt: skip


def finetune_arguments(checkpoint: Path, dataset: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of a small run of `sdxl_train.py`; later ones win over earlier ones."""
    return [
        "--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(dataset),
        "--output_dir", str(output), "--output_name", "model", "--learning_rate", "1e-3", "--max_train_steps", "4", "--seed", "11",
        "--max_data_loader_n_workers", "0", *more,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """Return an environment in which runs repeat bit for bit: the number of threads decides the order of sums."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_command(args: Sequence[str], launcher: Sequence[str] = (), script: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    """Run a script to its end as a person would."""
    return subprocess.run(
        [sys.executable, *launcher, script, *args], capture_output=True, text=True, env=environment(), cwd=ROOT, check=False
    )


def start_command(args: Sequence[str], script: str = SCRIPT) -> subprocess.Popen[str]:
    """Start a script and return at once; standard error can be read."""
    return subprocess.Popen([sys.executable, script, *args], stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file."""
    return dict(load_file(path))


def assert_same_bits(one: Path, other: Path) -> None:
    """Hold that two files have the same tensors, bit for bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def wait_for(path: Path, seconds: float = 120) -> None:
    """Wait until a file or folder appears."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)
