"""Files of pictures: names, metadata that other programs read, full disks."""

import errno
import json
import re
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image

from library.generation.output import PictureFiles, parameters_text
from library.generation.request import ImageRequest
from library.options.errors import UserError

WEBUI = json.loads((Path(__file__).parents[1] / "compat" / "prompt_reference_values.json").read_text(encoding="utf-8"))[
    "webui_parameters_text"
]
NOW = datetime(2026, 1, 31, 12, 0, 5)
REQUEST = ImageRequest(
    "a photo of a (red:1.2) cat, 日本", "blurry, lowres", width=1024, height=768, steps=28, seed=42, sampler="euler_a",
    original_wh=(640, 480), crop_top_left=(8, 16), raw_prompt="a photo … --n blurry, lowres",
)  # fmt: skip
PICTURE = Image.new("RGB", (64, 32), "red")


def files(folder: Path, sequential: bool = False) -> PictureFiles:
    return PictureFiles(str(folder), sequential=sequential, model_name="my_model")


def test_a_name_has_the_time_the_place_in_the_batch_and_the_seed(tmp_path):
    assert files(tmp_path / "new").save(PICTURE, REQUEST, 3, NOW, {}) == tmp_path / "new" / "im_20260131120005_003_42.png"


def test_a_name_that_is_taken_gets_a_number(tmp_path):
    names = [files(tmp_path).save(PICTURE, REQUEST, 0, NOW, {}).name for _ in range(3)]
    assert names == ["im_20260131120005_000_42.png", "im_20260131120005_000_42_2.png", "im_20260131120005_000_42_3.png"]


def test_sequential_names_count_on_from_what_the_folder_holds(tmp_path):
    first = files(tmp_path, sequential=True)
    assert [first.save(PICTURE, REQUEST, 0, NOW, {}).name for _ in range(2)] == ["im_000001.png", "im_000002.png"]
    (tmp_path / "im_000041.png").touch()
    assert files(tmp_path, sequential=True).save(PICTURE, REQUEST, 0, NOW, {}).name == "im_000042.png"


def test_a_picture_carries_the_fields_sd_scripts_writes_in_its_order(tmp_path):
    with Image.open(files(tmp_path).save(PICTURE, REQUEST, 0, NOW, {})) as picture:
        assert picture.convert("RGB").tobytes() == PICTURE.tobytes()
        assert list(picture.text.items())[:-1] == [
            ("prompt", "a photo of a (red:1.2) cat, 日本"),
            ("seed", "42"),
            ("sampler", "euler_a"),
            ("steps", "28"),
            ("scale", "7.5"),
            ("negative-prompt", "blurry, lowres"),
            ("raw-prompt", "a photo … --n blurry, lowres"),
            ("original-height", "480"),
            ("original-width", "640"),
            ("original-height-negative", "None"),
            ("original-width-negative", "None"),
            ("crop-top", "8"),
            ("crop-left", "16"),
        ]
        assert list(picture.text)[-1] == "parameters"


def test_the_parameters_text_is_read_as_web_user_interfaces_read_it():
    text = parameters_text(REQUEST, (1024, 768), "my_model", {"foo": 0.8, "bar": 1.0})
    *lines, last = text.split("\n")
    assert lines == ["a photo of a (red:1.2) cat, 日本", "Negative prompt: blurry, lowres"]
    assert re.findall(WEBUI["field_regex"], last) == [
        ("Steps", "28"),
        ("Sampler", "Euler a"),
        ("CFG scale", "7.5"),
        ("Seed", "42"),
        ("Size", "1024x768"),
        ("Model", "my_model"),
        ("Networks", '"foo: 0.8, bar: 1"'),
        ("RNG", "CPU"),
    ]
    reference = dict(WEBUI["fields"])
    assert all(reference[key] == value for key, value in re.findall(WEBUI["field_regex"], last) if key in reference)


def test_the_negative_line_is_left_out_when_there_is_none():
    assert len(parameters_text(ImageRequest("a", seed=1), (8, 8), "m", {}).split("\n")) == 2


def test_a_full_disk_is_a_sentence_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(self, target, **_):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"im_20260131120005_000_42.png could not be written: the disk is full"):
        files(tmp_path).save(PICTURE, REQUEST, 0, NOW, {})
    assert list(tmp_path.iterdir()) == []
