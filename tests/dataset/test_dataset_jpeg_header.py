"""The quick reading of JPEG headers says what Pillow says, or nothing."""

import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from library.dataset.images import Trait, inspect_image
from library.dataset.jpeg_header import jpeg_facts


def jpeg(size: tuple[int, int] = (40, 30), mode: str = "RGB", **save: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 80).save(buffer, "JPEG", **save)
    return buffer.getvalue()


def exif(orientation: int, *, order: str = "II", padding: int = 0) -> Image.Exif:
    made = Image.Exif()
    made.endian = "<" if order == "II" else ">"
    made[274] = orientation
    if padding:
        made[270] = "x" * padding
    return made


def with_segment(data: bytes, kind: int, content: bytes) -> bytes:
    """Put a segment at the beginning of a JPEG."""
    return data[:2] + bytes([0xFF, kind]) + (len(content) + 2).to_bytes(2, "big") + content + data[2:]


def written(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    return str(path)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    progressive=st.booleans(),
    orientation=st.one_of(st.none(), st.integers(0, 9)),
    order=st.sampled_from(["II", "MM"]),
    padding=st.sampled_from([0, 10, 3000, 9000]),
    comment=st.sampled_from([b"", b"x" * 5000]),
)
def test_it_agrees_with_pillow(tmp_path: Path, size, mode, progressive, orientation, order, padding, comment) -> None:
    options = {"progressive": progressive} | ({"comment": comment} if comment else {})
    if orientation is not None:
        options["exif"] = exif(orientation, order=order, padding=padding)
    path = written(tmp_path, jpeg(size, mode, **options))
    facts = jpeg_facts(path)
    assert facts in (None, inspect_image(path))
    if orientation in (None, *range(1, 9)):
        assert facts is not None


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")
def test_a_thumbnail_before_the_picture_does_not_count(tmp_path: Path) -> None:
    thumbnail = jpeg((16, 12))
    path = written(tmp_path, with_segment(jpeg((400, 300)), 0xE2, b"MPF\0" + thumbnail * 20))
    assert jpeg_facts(path) == inspect_image(path)
    assert jpeg_facts(path).size == (400, 300)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xe0\x00\x10JFIF\xff\xd9",
        jpeg()[:-2],
        jpeg()[:200],
        jpeg() + b"\0" * 100,
        with_segment(jpeg(), 0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
        with_segment(jpeg(), 0xE1, b"Exif\0\0nonsense"),
        with_segment(jpeg(), 0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'),
        with_segment(jpeg(), 0x01, b""),
        with_segment(with_segment(jpeg(), 0xE1, exif(6).tobytes()), 0xE1, exif(3).tobytes()),
    ],
    ids=[
        "empty", "three bytes", "no frame", "no end", "cut off", "more behind", "EXIF beyond its end", "no EXIF", "XMP",
        "unknown segment", "two EXIF",
    ],
)  # fmt: skip
def test_what_is_unusual_is_left_to_pillow(tmp_path: Path, data: bytes) -> None:
    assert jpeg_facts(written(tmp_path, data)) is None


def test_other_formats_and_missing_files_are_left_to_pillow(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert jpeg_facts(str(tmp_path / "a.png")) is None
    assert jpeg_facts(str(tmp_path / "gone.jpg")) is None


def test_other_data_of_applications_is_passed_over(tmp_path: Path) -> None:
    data = with_segment(with_segment(jpeg(), 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"), 0xE2, b"ICC_PROFILE\0" + b"\0" * 3000)
    assert jpeg_facts(written(tmp_path, data)).size == (40, 30)


def test_traits_are_told(tmp_path: Path) -> None:
    assert jpeg_facts(written(tmp_path, jpeg(mode="CMYK"))).traits == Trait.CMYK
    assert jpeg_facts(written(tmp_path, jpeg(mode="L"))).traits == Trait.GREY
