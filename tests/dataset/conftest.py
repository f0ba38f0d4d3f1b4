"""Fixtures of the dataset's tests."""

from pathlib import Path

import pytest
from dataset_samples import FakeFamily, FakeVae, make_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures of four shapes, with captions."""
    images = tmp_path / "images"
    images.mkdir()
    for number, size in enumerate([(64, 64), (96, 64), (64, 96), (80, 60), (128, 64)]):
        make_image(images / f"im{number}.png", size, seed=number)
        (images / f"im{number}.txt").write_text(f"picture {number}, tag a, tag b\n")
    return images


@pytest.fixture
def family() -> FakeFamily:
    return FakeFamily()


@pytest.fixture
def vae() -> FakeVae:
    return FakeVae()
