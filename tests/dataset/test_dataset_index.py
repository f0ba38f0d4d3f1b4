"""What is found in folders, and what is complained about before anything expensive is done."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from dataset_samples import config, make_image, section, subset
from PIL import Image

from library.dataset.findings import Findings, Kind, Severity
from library.dataset.index import balance_regularisation, build_index
from library.options.errors import UserError


def test_all_bad_files_are_named_together(folder: Path) -> None:
    (folder / "im0.png").write_bytes(b"")
    (folder / "im1.png").write_bytes((folder / "im1.png").read_bytes()[:-40])
    (folder / "im2.txt").write_bytes(b"caf\xe9")
    (folder / "im3.txt").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        build_index(config(section(subset(folder))))
    told = str(caught.value)
    assert told.startswith("The dataset has 4 errors:")
    for name in ["im0.png is empty", "im1.png cannot be read", "im2.txt is not UTF-8", "im3.txt is an empty caption file"]:
        assert name in told
    assert "im4" not in told


def test_an_image_too_small_for_its_bucket_is_named(folder: Path) -> None:
    make_image(folder / "tiny.png", (20, 20))
    (folder / "tiny.txt").write_text("t")
    with pytest.raises(UserError, match=r"tiny\.png: it is 20x20.*switch bucket_no_upscale off"):
        build_index(config(section(subset(folder), enable_bucket=True, bucket_no_upscale=True)))


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There are no images in") as error:
        build_index(config(section(subset(tmp_path))))
    assert str(error.value).count(str(tmp_path)) == 1


def test_a_folder_without_images_beside_another_is_only_odd(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    build_index(config(section(subset(folder), subset(tmp_path / "empty"))))
    assert f"There are no images in {tmp_path / 'empty'}. Files directly in the folder count" in caplog.text


def test_only_regularisation_images_are_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match="only regularisation images"):
        build_index(config(section(subset(folder, is_reg=True))))


def test_class_tokens_stand_in_for_missing_captions_only(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "im0.txt").unlink()
    (found,) = build_index(config(section(subset(folder, class_tokens="sks dog"))))
    assert [item.caption for item in found.items[:2]] == ["sks dog", "picture 1, tag a, tag b"]
    assert not caplog.records


def test_missing_captions_are_warned_about_once_with_names(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (found,) = build_index(config(section(subset(folder, caption_extension=".caption"))))
    assert {item.caption for item in found.items} == {""}
    (record,) = caplog.records
    assert "5 of 5 images" in record.getMessage()
    assert "im0.png" in record.getMessage()
    assert '.txt files lie beside 5 of them: set caption_extension = ".txt" if they hold the captions.' in record.getMessage()
    assert "Check caption_extension" in record.getMessage()


def test_turned_images_get_their_upright_size_and_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(folder / "im1.png") as image:
        image.save(folder / "im1.png", exif=exif)
    (found,) = build_index(config(section(subset(folder))))
    assert found.items[1].size == (64, 96)
    assert "Images stored turned or mirrored (EXIF orientation): 1." in caplog.text


def test_findings_are_handed_over_instead_of_raised_and_bad_images_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "im0.png").write_bytes(b"")
    (folder / "im1.txt").unlink()
    findings = Findings()
    (found,) = build_index(config(section(subset(folder))), findings)
    assert [Path(item.path).name for item in found.items] == ["im1.png", "im2.png", "im3.png", "im4.png"]
    assert [kind for kind, _, _ in findings.groups(Severity.ERROR)] == [Kind.UNREADABLE_IMAGE]
    assert [kind for kind, _, _ in findings.groups(Severity.WARNING)] == [Kind.NO_CAPTION]
    assert not caplog.records


def test_pictures_that_are_not_plain_are_counted_by_what_they_are(folder: Path) -> None:
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(grey).save(folder / "im0.png")
    Image.new("CMYK", (64, 64)).save(folder / "ink.jpg")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moves.webp", save_all=True, append_images=frames[1:])
    findings = Findings()
    build_index(config(section(subset(folder, class_tokens=""))), findings)
    told = {kind: [problem.sentence for problem in problems] for kind, _, problems in findings.groups(Severity.WARNING)}
    assert told == {
        Kind.COLOUR: ["1 images have 16 bits a channel: im0.png.", "1 images are CMYK: ink.jpg."],
        Kind.ANIMATED: ["1 images are animated: moves.webp."],
    }


def test_images_that_differ_in_the_extension_have_caches_of_their_own(tmp_path: Path) -> None:
    for name in ["a.png", "a.webp", "a_b.png"]:
        make_image(tmp_path / name)
    (found,) = build_index(config(section(subset(tmp_path, class_tokens=""))))
    assert [Path(item.cache_stem).name for item in found.items] == ["a", "a.webp", "a_b"]


@pytest.mark.parametrize(
    ("num_train", "repeats", "uses"),
    [
        (3, [1] * 5, [1, 1, 1, 0, 0]),
        (10, [1] * 3, [4, 3, 3]),
        (30, [2] * 3, [10, 10, 10]),
        (10, [5] * 3, [5, 5, 0]),
        (3, [4] * 10, [4] + [0] * 9),
        (0, [1] * 3, [0, 0, 0]),
        (5, [], []),
    ],
)
def test_regularisation_images_are_balanced_as_in_the_table(num_train: int, repeats: list[int], uses: list[int]) -> None:
    assert balance_regularisation(num_train, repeats) == uses


def test_regularisation_images_come_last_and_unused_ones_are_left_out(folder: Path, tmp_path: Path) -> None:
    reg = tmp_path / "reg"
    reg.mkdir()
    for number in range(7):
        make_image(reg / f"r{number}.png")
    (found,) = build_index(config(section(subset(reg, is_reg=True, class_tokens="dog"), subset(folder))))
    assert [item.is_reg for item in found.items] == [False] * 5 + [True] * 5
    assert found.image_counts == (7, 5)
    assert [item.number for item in found.items] == list(range(10))


@pytest.mark.parametrize(
    ("files", "class_tokens", "caption"),
    [
        ({"name_1_2_30_40.txt": "own", "name.txt": "shared"}, None, "own"),
        ({"name.txt": "shared"}, None, "shared"),
        ({"name.txt": "shared"}, "sks dog", "shared"),
        ({"name_1_2.txt": "of another"}, "sks dog", "sks dog"),
        ({"name.caption": "another ending"}, None, ""),
        ({}, "sks dog", "sks dog"),
        ({}, "", ""),
        ({"name.txt": "\n"}, "sks dog", ""),
    ],
)
def test_a_caption_is_looked_for_by_the_images_name_then_without_the_place_of_a_face(
    tmp_path: Path, files: dict[str, str], class_tokens: str | None, caption: str
) -> None:
    make_image(tmp_path / "name_1_2_30_40.png")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (found,) = build_index(config(section(subset(tmp_path, class_tokens=class_tokens))))
    assert [item.caption for item in found.items] == [caption]


def test_underscores_of_a_folder_are_no_place_of_a_face(tmp_path: Path) -> None:
    images = tmp_path / "a_1_2_3_4" / "b_5"
    images.mkdir(parents=True)
    make_image(images / "name.png")
    (tmp_path / "a_1.txt").write_text("not of this image")
    (found,) = build_index(config(section(subset(images, class_tokens="dog"))))
    assert found.items[0].caption == "dog"


def test_regularisation_images_are_taken_from_subset_after_subset(folder: Path, tmp_path: Path) -> None:
    for name, count in (("first", 3), ("second", 10)):
        (tmp_path / name).mkdir()
        for number in range(count):
            make_image(tmp_path / name / f"{number}.png")
    reg = [subset(tmp_path / name, is_reg=True, class_tokens="dog") for name in ("first", "second")]
    (found,) = build_index(config(section(*reg, subset(folder))))
    assert [(item.subset, item.repeats) for item in found.items] == [(2, 1)] * 5 + [(0, 1)] * 3 + [(1, 1)] * 2


def test_images_of_one_name_in_two_folders_of_metadata_files_are_both_used(tmp_path: Path) -> None:
    parts = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_image(tmp_path / name / "same.png")
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"same.png": {"caption": name}}))
        parts.append(subset(tmp_path / name, metadata_file=str(file)))
    (found,) = build_index(config(section(*parts)))
    assert [item.caption for item in found.items] == ["one", "two"]
