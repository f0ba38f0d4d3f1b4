"""What is written about a dataset into the files trained with it."""

import json
from pathlib import Path

import pytest
from dataset_samples import config, make_image, section, subset

from library.dataset.dataset import Dataset
from library.dataset.facts import bucket_info, metadata_facts, tag_frequency

WITH_FILE = {"ss_datasets", "ss_tag_frequency", "ss_dataset_dirs"}
WITHOUT_FILE = {
    "ss_batch_size_per_device", "ss_total_batch_size", "ss_resolution", "ss_color_aug", "ss_flip_aug", "ss_random_crop",
    "ss_shuffle_caption", "ss_enable_bucket", "ss_bucket_no_upscale", "ss_min_bucket_reso", "ss_max_bucket_reso", "ss_keep_tokens",
    "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_tag_frequency", "ss_bucket_info",
}  # fmt: skip


def test_tags_are_counted_by_folder_in_lower_case(folder: Path) -> None:
    (folder / "im0.txt").write_text("Tag A,, other , tag a\n")
    (found,) = Dataset(config(section(subset(folder))), 1).sections
    counts = tag_frequency(found)["images"]
    assert (counts["tag a"], counts["other"], counts["tag b"]) == (6, 1, 4)
    assert "" not in counts


def test_buckets_are_counted_with_repeats(folder: Path) -> None:
    (found,) = Dataset(config(section(subset(folder, num_repeats=3), enable_bucket=True)), 1).sections
    info = bucket_info(found)
    assert info is not None
    assert sum(bucket["count"] for bucket in info["buckets"].values()) == 15
    assert info["mean_img_ar_error"] >= 0
    (plain,) = Dataset(config(section(subset(folder))), 1).sections
    assert bucket_info(plain) is None


def test_with_a_dataset_file_each_dataset_is_described(folder: Path, tmp_path: Path) -> None:
    reg = tmp_path / "reg"
    reg.mkdir()
    make_image(reg / "r.png")
    parts = [subset(folder, num_repeats=2), subset(reg, is_reg=True, class_tokens="dog", num_repeats=3)]
    dataset = Dataset(config(section(*parts), section(subset(folder), resolution=(32, 32))), 1)
    facts = json.loads(json.dumps(metadata_facts(dataset)))
    assert facts.keys() == WITH_FILE
    first = facts["ss_datasets"][0]
    assert (first["num_train_images"], first["num_reg_images"], first["resolution"]) == (10, 3, [64, 64])
    assert [(s["image_dir"], s["img_count"], s["is_reg"]) for s in first["subsets"]] == [("images", 5, False), ("reg", 1, True)]
    assert facts["ss_dataset_dirs"] == {
        "images": {"n_repeats": 2, "img_count": 5},
        "images (2)": {"n_repeats": 1, "img_count": 5},
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_without_a_dataset_file_the_facts_are_flat(folder: Path, processes: int) -> None:
    facts = metadata_facts(Dataset(config(section(subset(folder)), from_file=False), 1), processes)
    assert facts.keys() == WITHOUT_FILE
    assert (facts["ss_batch_size_per_device"], facts["ss_total_batch_size"]) == (2, 2 * processes)
    assert facts["ss_resolution"] == "(64, 64)"


def test_tags_of_one_folder_in_two_datasets_are_counted_once(folder: Path) -> None:
    dataset = Dataset(config(section(subset(folder)), section(subset(folder), resolution=(32, 32))), 1)
    assert metadata_facts(dataset)["ss_tag_frequency"]["images"]["tag a"] == 5


@pytest.mark.parametrize("name", ["color_aug", "random_crop", "flip_aug"])
def test_augmentation_is_noted(folder: Path, name: str) -> None:
    for switched in (False, True):
        source = subset(folder, **{name: switched})
        flat = metadata_facts(Dataset(config(section(source), from_file=False), 1))
        assert flat[f"ss_{name}"] is switched
        (described,) = metadata_facts(Dataset(config(section(source)), 1))["ss_datasets"]
        assert described["subsets"][0][name] is switched
