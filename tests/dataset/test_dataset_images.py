"""Pictures: what is found without decoding, and pixels against OpenCV and Pillow used directly."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from dataset_samples import make_image, section
from PIL import Image

from library.dataset.buckets import BucketChooser
from library.dataset.images import fit, inspect_image, read_pixels, resize, to_model_range
from library.options.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
def test_the_size_is_read(tmp_path: Path, name: str) -> None:
    assert inspect_image(str(make_image(tmp_path / name, (50, 30)))).size == (50, 30)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_cut_off_file_is_found(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    Image.fromarray(NOISE).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=f"{name} "):
        inspect_image(str(path))


def test_a_flipped_bit_in_a_png_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(NOISE).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png cannot be read: its IDAT chunk is damaged"):
        inspect_image(str(path))


def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path: Path) -> None:
    path = make_image(tmp_path / "a.jpg", (50, 30))
    path.write_bytes(path.read_bytes() + b"trailer of a phone")
    assert inspect_image(str(path)).size == (50, 30)


def test_an_empty_file_and_one_that_is_no_picture_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"a\.png is empty"):
        inspect_image(str(tmp_path / "a.png"))
    with pytest.raises(UserError, match=r"b\.png is not a picture"):
        inspect_image(str(tmp_path / "b.png"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_set_upright_as_pillow_does(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(NOISE).save(path, exif=exif)
    facts = inspect_image(str(path))
    with Image.open(path) as stored:
        upright = ImageOps.exif_transpose(stored)
    assert facts.orientation == orientation
    assert facts.size == upright.size
    np.testing.assert_array_equal(read_pixels(str(path), orientation), np.asarray(upright))


def test_transparency_is_dropped_not_composed(tmp_path: Path) -> None:
    pixels = np.dstack([NOISE, np.zeros(NOISE.shape[:2], np.uint8)])
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_pixels(str(tmp_path / "a.png"), 1), NOISE)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    grey = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    pixels = read_pixels(str(tmp_path / "a.png"), 1)
    np.testing.assert_array_equal(pixels[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(NOISE).convert(mode).save(path)
    assert read_pixels(str(path), inspect_image(str(path)).orientation).shape == NOISE.shape


def test_shrinking_averages_areas_and_growing_uses_lanczos() -> None:
    np.testing.assert_array_equal(resize(NOISE, (47, 61), None), cv2.resize(NOISE, (47, 61), interpolation=cv2.INTER_AREA))
    lanczos = np.asarray(Image.fromarray(NOISE).resize((300, 91), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(resize(NOISE, (300, 91), None), lanczos)
    np.testing.assert_array_equal(resize(NOISE, (300, 61), None), np.asarray(Image.fromarray(NOISE).resize((300, 61), 1)))


def test_area_averages_equal_the_exact_mean() -> None:
    exact = NOISE.astype(np.float64).reshape(9, 10, 13, 10, 3).mean(axis=(1, 3))
    assert np.abs(resize(NOISE, (13, 9), "area") - exact).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("name", "flag"),
    [("nearest", cv2.INTER_NEAREST_EXACT), ("bilinear", 1), ("linear", 1), ("bicubic", 2), ("cubic", 2), ("area", 3)],
)
@pytest.mark.parametrize("size", [(47, 61), (300, 200)])
def test_named_methods_are_opencvs(name: str, flag: int, size: tuple[int, int]) -> None:
    np.testing.assert_array_equal(resize(NOISE, size, name), cv2.resize(NOISE, size, interpolation=flag))


@pytest.mark.parametrize(("name", "filter_"), [("lanczos", 1), ("box", 4)])
def test_lanczos_and_box_are_pillows(name: str, filter_: int) -> None:
    expected = np.asarray(Image.fromarray(NOISE).resize((47, 61), filter_))
    np.testing.assert_array_equal(resize(NOISE, (47, 61), name), expected)


def test_fitting_resizes_and_crops_to_the_centre() -> None:
    geometry = BucketChooser(section(resolution=(64, 64))).choose((130, 90))
    expected = cv2.resize(NOISE, (92, 64), interpolation=cv2.INTER_AREA)[:, 14:78]
    np.testing.assert_array_equal(fit(NOISE, geometry, None), expected)


def test_pixels_become_minus_one_to_one() -> None:
    pixels = np.array([[[0, 255, 51]]], np.uint8)
    np.testing.assert_allclose(to_model_range(pixels)[:, 0, 0], [-1, 1, -0.6], atol=1e-6)
