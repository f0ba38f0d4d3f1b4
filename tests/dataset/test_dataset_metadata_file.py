"""Datasets described by a metadata file: where images are found, what their captions are, and what is wrong with a file."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from library.dataset.dataset import Dataset
from library.dataset.facts import section_facts, tag_frequency
from library.dataset.findings import Findings, Kind, Severity
from library.dataset.index import build_index
from library.dataset.listing import positions_by_folder
from library.dataset.metadata_file import caption_of, read_metadata
from library.options.dataset_config import DatasetConfig, load_dataset_config
from library.options.errors import UsageError, UserError
from library.options.groups.cache import CacheOptions
from library.options.groups.caption import CaptionTextOptions
from library.options.groups.dataset import DatasetOptions
from library.options.groups.image import ImageOptions
from tests.dataset.dataset_samples import config, make_image, section, subset

NAMES = ("a.png", "b.jpg", "deep/c.webp")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        make_image(tmp_path / "images" / name, seed=number)
    return tmp_path / "images"


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def items_of(file: str, image_dir: Path | str = "", **changes: object):
    (built,) = build_index(config(section(subset(image_dir, metadata_file=file, **changes))))
    return built.items


def load(**dataset: object) -> DatasetConfig:
    options = DatasetOptions(**{"resolution": "64"} | dataset)
    return load_dataset_config(options, CaptionTextOptions(), ImageOptions(), CacheOptions())


@pytest.mark.parametrize("form", ["absolute", "relative", "without_ending"])
def test_an_image_is_found_by_its_path_in_the_folder_or_without_its_ending(images: Path, tmp_path: Path, form: str) -> None:
    keys = {
        "absolute": [str(images / name) for name in NAMES],
        "relative": list(NAMES),
        "without_ending": [name.rpartition(".")[0] for name in NAMES],
    }[form]
    file = write(tmp_path / "meta.json", {key: {"caption": f"c{number}"} for number, key in enumerate(keys)})
    found = {item.path: item.caption for item in items_of(file, "" if form == "absolute" else images)}
    assert found == {str(images / name): f"c{number}" for number, name in enumerate(NAMES)}


@pytest.mark.parametrize("name", ["x.PNG", "x.Png", "x.pNg"])
def test_a_key_without_ending_finds_an_ending_however_it_is_spelled(images: Path, tmp_path: Path, name: str) -> None:
    make_image(images / "x.png").rename(images / name)
    file = write(tmp_path / "meta.json", {"x": {"caption": "odd"}, "a": {"caption": "usual"}})
    assert {item.path: item.caption for item in items_of(file, images)} == {
        str(images / name): "odd",
        str(images / "a.png"): "usual",
    }


def test_json_lines_are_read_and_blank_ones_skipped(images: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"image_path": name, "caption": f"c{n}", "tags": "t"}) for n, name in enumerate(NAMES)]
    file = write(tmp_path / "meta.jsonl", "\n\n".join(lines) + "\n")
    assert {item.caption for item in items_of(file, images)} == {"c0,t", "c1,t", "c2,t"}


def test_an_unusual_line_separator_inside_a_caption_does_not_end_the_line(images: Path, tmp_path: Path) -> None:
    line = json.dumps({"image_path": "a.png", "caption": "one\u2028two"}, ensure_ascii=False)
    (item,) = items_of(write(tmp_path / "m.jsonl", line), images)
    assert item.caption == "one\u2028two"


def test_a_key_without_ending_takes_the_first_of_several_images_and_caches_stay_apart(images: Path, tmp_path: Path) -> None:
    make_image(images / "a.jpg", seed=9)
    (first,) = items_of(write(tmp_path / "m.json", {"a": {}}), images)
    (second,) = items_of(write(tmp_path / "m.json", {"a.png": {}}), images)
    assert (first.path, second.path) == (str(images / "a.jpg"), str(images / "a.png"))
    assert (first.cache_stem, second.cache_stem) == (str(images.resolve() / "a"), str(images.resolve() / "a.png"))


def test_sizes_come_from_the_images_whatever_the_file_says(images: Path, tmp_path: Path) -> None:
    true_size = {item.path: item.size for item in items_of(write(tmp_path / "m.json", {"a": {}}), images)}
    stale = {"a": {"image_size": [7, 9], "train_resolution": [512, 512]}}
    assert {item.path: item.size for item in items_of(write(tmp_path / "m.json", stale), images)} == true_size


def test_a_wrong_folder_is_told_once_for_all_entries(images: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "m.json", {f"{number}.png": {} for number in range(1000)})
    with pytest.raises(UserError, match="nor one for any of the other 999 entries") as error:
        items_of(file, images)
    assert len(str(error.value)) < 1000


def test_longest_keys_come_first_and_caches_lie_beside_the_image(images: Path, tmp_path: Path) -> None:
    items = items_of(write(tmp_path / "meta.json", {name: {"caption": "c"} for name in NAMES}), images)
    assert [item.path for item in items] == [str(images / name) for name in ("deep/c.webp", "a.png", "b.jpg")]
    assert [item.cache_stem for item in items] == [str(images.resolve() / stem) for stem in ("deep/c", "a", "b")]


@pytest.mark.parametrize(
    ("caption", "tags", "separator", "multiline", "expected"),
    [
        ("c0", "a, b", ",", False, "c0,a, b"),
        ("", "only", ",", False, "only"),
        ("c0", "", ",", False, "c0"),
        ("", "", ",", False, ""),
        ("c0", "a b", ";", False, "c0;a b"),
        ("l1\n\nl2", "a\nb", ",", True, "l1,a,b\nl2,a,b"),
        ("", "a\nb", ",", True, "a,b"),
        ("l1\nl2", "t", ",", False, "l1"),
    ],
)
def test_caption_and_tags_are_joined_as_sd_scripts_does(tmp_path, caption, tags, separator, multiline, expected) -> None:
    (entry,) = read_metadata(write(tmp_path / "m.json", {"k": {"caption": caption, "tags": tags}}))
    assert caption_of(entry, separator, multiline=multiline) == expected


def test_everything_that_is_wrong_with_entries_is_told_together(images: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "meta.json", {"a.png": {}, "a": {}, "gone.png": {}, "b.jpg": {"caption": "c"}})
    with pytest.raises(UserError) as error:
        items_of(file, images)
    told = str(error.value)
    assert f"entry 'gone.png': there is no image 'gone.png' here or in {images}" in told
    assert "has two entries, 'a.png' and 'a'" in told


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.json", '{"a.png":\n {"caption" "x"}}', "is not valid JSON: Expecting ':' delimiter at line 2, column 13."),
        ("m.json", "[1]", "must hold one JSON object whose keys are images"),
        ("m.json", '{"a.png": 3}', "entry 'a.png' must be an object with caption or tags, not 3"),
        ("m.json", '{"a.png": {"tags": ["a"]}}', "tags must be a text in quotes"),
        ("m.jsonl", '{"image_path": "a.png"}\n{"caption": "x"}', "line 2 has no image_path"),
        (
            "m.jsonl",
            '{"image_path": "a.png"}\n{',
            "line 2 is not valid JSON: Expecting property name enclosed in double quotes at column 2.",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_told_with_the_place(
    images: Path, tmp_path: Path, name: str, content: str, words: str
) -> None:
    with pytest.raises(UserError) as error:
        items_of(write(tmp_path / name, content), images)
    assert words in str(error.value) and str(tmp_path / name) in str(error.value)


def test_two_keys_that_lead_to_one_file_are_told_whatever_their_paths(images: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(images)
    (images / "link.png").symlink_to(images / "a.png")
    for keys in (("a.png", str(tmp_path / "other" / "a.png")), ("a.png", "link.png"), ("a.png", "deep/../a.png")):
        with pytest.raises(UserError, match="has two entries"):
            items_of(write(tmp_path / "m.json", {key: {"caption": "c"} for key in keys}), images)


def test_a_key_that_stands_in_the_file_twice_is_told(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has two entries"):
        items_of(write(tmp_path / "m.json", '{"a.png": {"caption": "x"}, "a.png": {"caption": "y"}}'), images)


def test_images_without_entry_and_entries_without_text_are_mentioned(images: Path, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        items_of(write(tmp_path / "m.json", {"a.png": {}, "deep/c": {"tags": "t"}}), images)
    assert "1 of 2 images" in caplog.text and "neither caption nor tags" in caplog.text
    assert "1 images of" in caplog.text and "have no entry" in caplog.text


def test_in_json_takes_the_place_of_folders_with_repeats(images: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "m.json", {"a.png": {"caption": "c"}})
    data = load(in_json=file, train_data_dir=str(images), dataset_repeats=3)
    (only,) = data.sections[0].subsets
    assert (only.metadata_file, only.image_dir, only.num_repeats) == (file, str(images), 3)
    assert len(Dataset(data, seed=0).sections[0].items) == 1


def test_what_goes_with_in_json_is_told(tmp_path: Path) -> None:
    file = write(tmp_path / "m.json", {})
    with pytest.raises(UsageError, match="needs --train_data_dir FOLDER, the folder of the images"):
        load(in_json=file)
    data = load(in_json=file, train_data_dir=str(tmp_path), reg_data_dir=str(tmp_path))
    assert data.warnings == ("--reg_data_dir is ignored because --in_json names the images.",)


def write_config(tmp_path: Path, *subsets: str) -> Path:
    path = tmp_path / "data.toml"
    tables = "\n".join(f"[[datasets.subsets]]\n{table}" for table in subsets)
    path.write_text(f"[[datasets]]\nresolution = 64\n{tables}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("subsets", "words"),
    [
        (("metadata_file = 'm.json'", "image_dir = '.'"), "mixes subsets, 1 with a metadata_file and 1 with an image_dir alone"),
        (("metadata_file = 'missing.json'",), "there is no metadata_file missing.json"),
        (
            ("metadata_file = 'm.json'\nclass_tokens = 'x'\nis_reg = true",),
            "is_reg is for subsets with an image_dir alone; these have a metadata_file. Remove it.",
        ),
        (("metadata_file = 'm.json'\nimage_dir = 'missing'",), "image_dir missing is not a folder"),
    ],
)
def test_a_subset_that_cannot_be_is_refused(tmp_path: Path, monkeypatch, subsets, words) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "m.json", {})
    with pytest.raises(UsageError) as error:
        load(dataset_config=write_config(tmp_path, *subsets))
    assert words in " ".join(error.value.problems)


def test_the_same_metadata_file_twice_counts_once(images: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "m.json", {str(images / "a.png"): {}})
    data = load(dataset_config=write_config(tmp_path, "metadata_file = 'm.json'", "metadata_file = './m.json'"))
    assert len(data.sections[0].subsets) == 1
    assert "listed twice" in " ".join(data.warnings)


def test_what_models_record_of_it_names_the_file_and_counts_its_tags(images: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "meta.json", {"a.png": {"caption": "a dog", "tags": "Big, brown"}, "b.jpg": {"tags": "brown"}})
    (built,) = build_index(config(section(subset(images, metadata_file=file))))
    assert tag_frequency(built) == {"meta.json": {"big": 1, "brown": 2}}
    facts = section_facts(built)
    assert facts["is_dreambooth"] is False
    assert facts["subsets"][0]["metadata_file"] == "meta.json" and "class_tokens" not in facts["subsets"][0]
    (no_folder,) = build_index(config(section(subset("", metadata_file=write(tmp_path / "m.json", {str(images / "a.png"): {}})))))
    assert section_facts(no_folder)["subsets"][0]["image_dir"] is None
    plain = replace(subset(images), metadata_file=None)
    (of_folder,) = build_index(config(section(plain)))
    assert section_facts(of_folder)["is_dreambooth"] is True
    assert SimpleNamespace(**section_facts(of_folder)["subsets"][0]).class_tokens is None


def test_the_images_of_folders_are_gathered_in_one_pass() -> None:
    """A dataset of a million images may lie in ten thousand folders."""
    passes = 0

    def numbers() -> Iterator[int]:
        nonlocal passes
        passes += 1
        yield from (0, 2, 0, 1, 2)

    assert positions_by_folder(numbers(), 4) == [[0, 2], [3], [1, 4], []]
    assert passes == 1


@pytest.mark.parametrize("name", ["m.json", "m.jsonl"])
def test_every_mistake_is_told_by_itself_and_good_entries_are_looked_for_nevertheless(
    images: Path, tmp_path: Path, name: str
) -> None:
    if name == "m.json":
        content = '{"a.png": 3, "b.jpg": {"tags": ["a"]}, "gone.png": {}, "deep/c.webp": {}, "deep/c": {}}'
        places = ["entry 'a.png' must be", "entry 'b.jpg': tags must be"]
    else:
        keys = ("gone.png", "deep/c.webp", "deep/c")
        content = "\n".join(["{", '{"caption": "x"', *(json.dumps({"image_path": key}) for key in keys)])
        places = ["line 1 is not valid JSON", "line 2 is not valid JSON"]
    file, findings = write(tmp_path / name, content), Findings()
    build_index(config(section(subset(images, metadata_file=file))), findings)
    told = {kind: [problem.sentence for problem in problems] for kind, _, problems in findings.groups(Severity.ERROR)}
    assert [sentence.startswith(f"{file}, {place}") for sentence, place in zip(told[Kind.METADATA], places, strict=True)] == [
        True
    ] * 2
    assert [sentence.count(file) for sentence in told[Kind.METADATA]] == [1, 1]
    assert ["'gone.png'" in sentence or "has two entries" in sentence for sentence in told[Kind.UNRESOLVED]] == [True] * 2
    assert not findings.warnings_of(Kind.UNUSED_IMAGES)


def test_a_file_without_entries_is_told_as_that(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        items_of(write(tmp_path / "m.json", {}))
    assert f"{tmp_path / 'm.json'} has no entries." in str(error.value)
    assert "images in" not in str(error.value)
