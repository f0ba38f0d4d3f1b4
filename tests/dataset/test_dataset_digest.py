"""Digests of a dataset: the same wherever it lies, and another one for whatever training would notice."""

import shutil
from pathlib import Path

from dataset_samples import config, make_image, section, subset

from library.dataset.dataset import Dataset
from library.dataset.digest import dataset_digests, digest_of


def digests(folder: Path, **changes: object) -> dict[str, str]:
    return dataset_digests(Dataset(config(section(subset(folder, **changes))), seed=1))


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in before if before[name] != after[name]]


def test_each_digest_follows_its_own_side_of_the_data(folder: Path, tmp_path: Path) -> None:
    before = digests(folder)
    moved = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, moved)
    assert digests(moved) == before
    assert changed(before, digests(folder, num_repeats=2)) == ["images", "settings"]
    assert changed(before, digests(folder, flip_aug=True)) == ["settings"]
    assert changed(before, digests(folder, validation_split=0.4)) == ["images", "held_out", "captions", "settings"]
    (moved / "im0.txt").write_text("picture 0, tag a, tag c\n")
    assert changed(before, digests(moved)) == ["captions"]
    make_image(moved / "im5.png", (64, 64))
    (moved / "im5.txt").write_text("picture 5\n")
    assert changed(before, digests(moved)) == ["images", "captions"]


def test_one_digest_stands_for_all(folder: Path) -> None:
    before, after = digests(folder), digests(folder, flip_aug=True)
    assert digest_of(before) == digest_of(dict(reversed(before.items()))) != digest_of(after)
