"""What a state remembers of the images: everything the plan of an epoch depends on, and nothing else."""

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from dataset_samples import config, make_image, section, subset

from library.dataset.dataset import Dataset
from library.dataset.identity import dataset_identity

SUBSET = "subset 1 (images) of dataset 1"
DIGESTS = {"file names", "captions", "sizes, buckets and uses of the images"}


def changes(before: Dataset, after: Dataset, processes: int = 1) -> set[tuple[str, str]]:
    old, new = dataset_identity(before, 1), dataset_identity(after, processes)
    assert json.loads(json.dumps(new)) == new
    assert old.keys() == new.keys()
    return {(place, key) for place in new for key in new[place] if old[place][key] != new[place][key]}


def test_the_same_folder_elsewhere_is_the_same(folder: Path, tmp_path: Path) -> None:
    before = Dataset(config(section(subset(folder))), 1)
    (tmp_path / "elsewhere").mkdir()
    folder.rename(tmp_path / "elsewhere" / "images")
    assert changes(before, Dataset(config(section(subset(tmp_path / "elsewhere" / "images"))), 2)) == set()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda folder: make_image(folder / "new.png", (64, 64), seed=9), DIGESTS | {"number of images"}),
        (lambda folder: (folder / "im0.txt").write_text("another"), {"captions"}),
        (lambda folder: make_image(folder / "im0.png", (66, 64), seed=9), {"sizes, buckets and uses of the images"}),
        (lambda folder: (folder / "im0.png").rename(folder / "im00.png"), {"file names", "captions"}),
    ],
    ids=["an image more", "another caption", "another size", "another name"],
)
def test_images_and_captions_that_changed_show(folder: Path, change: Callable[[Path], object], found: set[str]) -> None:
    definition = config(section(subset(folder, class_tokens="a photo")))
    before = Dataset(definition, 1)
    change(folder)
    assert changes(before, Dataset(definition, 1)) == {(SUBSET, key) for key in found}


@pytest.mark.parametrize(
    ("own", "of_section", "key"),
    [
        ({"flip_aug": True}, {}, (SUBSET, "flip_aug")),
        ({"shuffle_caption": True}, {}, (SUBSET, "shuffle_caption")),
        ({"keep_tokens": 1}, {}, (SUBSET, "keep_tokens")),
        ({"custom_attributes": {"taken": date(2024, 5, 1)}}, {}, (SUBSET, "custom_attributes")),
        ({}, {"network_multiplier": 0.5}, ("dataset 1", "network_multiplier")),
        ({}, {"batch_size": 3}, ("dataset 1", "images per batch, over all processes")),
    ],
)
def test_settings_that_changed_show_by_name(folder: Path, own: dict, of_section: dict, key: tuple[str, str]) -> None:
    before = Dataset(config(section(subset(folder))), 1)
    assert changes(before, Dataset(config(section(subset(folder, **own), **of_section)), 1)) == {key}


def test_half_the_batch_in_twice_the_processes_is_the_same(folder: Path) -> None:
    before = Dataset(config(section(subset(folder), batch_size=4)), 1)
    assert changes(before, Dataset(config(section(subset(folder), batch_size=2)), 1), processes=2) == set()
