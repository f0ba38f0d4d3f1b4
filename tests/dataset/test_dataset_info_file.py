"""`cache_info`: sd-scripts' metadata_cache.json is read, checked against the files, and written so that both can use it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from dataset_samples import config, make_image, section, subset
from opened_files import OpenedFiles
from PIL import Image

from library.dataset.dataset import Dataset
from library.dataset.index import Section, build_index
from library.dataset.index_store import STORE_NAME
from library.dataset.info_file import INFO_NAME
from library.options.dataset_config import load_dataset_config
from library.options.groups.cache import CacheOptions
from library.options.groups.caption import CaptionTextOptions
from library.options.groups.dataset import DatasetOptions
from library.options.groups.image import ImageOptions


def index(folder: Path, **changes: Any) -> Section:
    (found,) = build_index(config(section(subset(folder, **{"cache_info": True} | changes))))
    return found


def captions(found: Section) -> dict[str, str]:
    return {Path(item.path).name: item.caption for item in found.items}


def written(folder: Path) -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = json.loads((folder / INFO_NAME).read_text(encoding="utf-8"))
    return content


def of_sd_scripts(folder: Path, **entries: tuple[str, list[int]]) -> None:
    """Write the file as sd-scripts does, from a folder it had another path to."""
    content = {
        f"elsewhere/images/{stem}.png": {"caption": caption, "resolution": size} for stem, (caption, size) in entries.items()
    }
    (folder / INFO_NAME).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> OpenedFiles:
    return OpenedFiles(monkeypatch)


def test_every_image_is_written_as_sd_scripts_reads_it(folder: Path) -> None:
    (folder / "im0.txt").write_text("café, 猫\n", encoding="utf-8")
    exif = Image.Exif()
    exif[274] = 6
    make_image(folder / "turned.jpg", (50, 40), exif=exif)
    index(folder, class_tokens="dog")
    entries = written(folder)
    assert list(entries) == [str(folder / name) for name in [*(f"im{n}.png" for n in range(5)), "turned.jpg"]]
    assert entries[str(folder / "im0.png")]["caption"] == "café, 猫"
    assert entries[str(folder / "im1.png")]["resolution"] == [96, 64]
    assert (entries[str(folder / "turned.jpg")]["caption"], entries[str(folder / "turned.jpg")]["resolution"]) == ("dog", [50, 40])
    assert "café, 猫" in (folder / INFO_NAME).read_text(encoding="utf-8")


def test_without_it_nothing_is_written(folder: Path) -> None:
    index(folder, cache_info=False)
    assert not (folder / INFO_NAME).exists()


def test_what_it_says_is_believed_without_the_database(folder: Path, opened: OpenedFiles) -> None:
    exif = Image.Exif()
    exif[274] = 8
    make_image(folder / "turned.jpg", (50, 40), exif=exif)
    first = list(index(folder).items)
    (folder / STORE_NAME).unlink()
    assert opened.during(lambda: index(folder)) == set()
    assert list(index(folder).items) == first


def test_what_changed_is_read_again_and_the_file_follows(folder: Path, opened: OpenedFiles) -> None:
    index(folder)
    (folder / STORE_NAME).unlink()
    (folder / "im1.txt").write_text("another, longer caption\n")
    make_image(folder / "im2.png", (32, 48))
    make_image(folder / "new.png")
    (folder / "im4.png").unlink()
    assert opened.during(lambda: index(folder, class_tokens="")) == {"im1.txt", "im2.png", "new.png"}
    assert captions(index(folder, class_tokens=""))["im1.png"] == "another, longer caption"
    entries = written(folder)
    assert entries[str(folder / "im1.png")]["caption"] == "another, longer caption"
    assert entries[str(folder / "im2.png")]["resolution"] == [32, 48]
    assert str(folder / "new.png") in entries
    assert str(folder / "im4.png") not in entries


def test_the_file_is_left_alone_when_nothing_changed(folder: Path) -> None:
    index(folder)
    before = (folder / INFO_NAME).stat().st_ino
    index(folder)
    assert (folder / INFO_NAME).stat().st_ino == before


def test_an_entry_of_sd_scripts_gives_the_caption_of_an_image_without_caption_file(folder: Path) -> None:
    for name in ("im0.txt", "im1.txt"):
        (folder / name).unlink()
    of_sd_scripts(folder, im0=("from the cache", [64, 64]), im2=("not this one", [64, 96]))
    for _ in range(2):  # it stays when the file is written anew
        found = captions(index(folder))
        assert found["im0.png"] == "from the cache"
        assert found["im1.png"] == ""
        assert found["im2.png"] == "picture 2, tag a, tag b"
    assert captions(index(folder, class_tokens="dog"))["im0.png"] == "dog"
    assert captions(index(folder))["im0.png"] == "from the cache"


def test_a_size_that_sd_scripts_wrote_is_not_believed(folder: Path) -> None:
    of_sd_scripts(folder, im1=("x", [64, 64]))
    assert index(folder).items[1].size == (96, 64)


def test_a_caption_file_that_is_gone_leaves_no_caption_behind(folder: Path) -> None:
    index(folder)
    (folder / "im0.txt").unlink()
    assert captions(index(folder))["im0.png"] == ""


def test_held_out_images_are_in_it_too_and_captions_stay_with_their_images(folder: Path) -> None:
    for _ in range(3):
        dataset = Dataset(config(section(subset(folder, cache_info=True, validation_split=0.4))), 1)
        everything = [*dataset.items, *dataset.held_out]
        assert len(dataset.items) == 3
        assert {Path(item.path).stem[2:]: item.caption for item in everything} == {
            str(n): f"picture {n}, tag a, tag b" for n in range(5)
        }
    assert len(written(folder)) == 5


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"a.png": 3, "im0.png": {}}', '{"im0.png": {"mtime_ns": "x", "bytes": 1, "resolution": [1]}}', "\udce9"],
)
def test_a_file_that_cannot_be_used_is_made_again(folder: Path, content: str, caplog) -> None:
    (folder / INFO_NAME).write_bytes(content.encode("utf-8", "surrogateescape"))
    with caplog.at_level(logging.WARNING):
        found = index(folder)
    assert captions(found) == {f"im{n}.png": f"picture {n}, tag a, tag b" for n in range(5)}
    assert len(written(folder)) == 5
    assert len(caplog.records) == (0 if content.startswith('{"') else 1)


def test_the_switch_on_the_command_line_writes_it_in_every_folder(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "2_dog")
    options = DatasetOptions(train_data_dir=str(tmp_path), resolution="64", cache_info=True)
    build_index(load_dataset_config(options, CaptionTextOptions(), ImageOptions(), CacheOptions()))
    assert len(written(tmp_path / "2_dog")) == 5
