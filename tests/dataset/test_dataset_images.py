"""Pictures: what is found without decoding, and pixels against OpenCV and Pillow used directly."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from dataset_samples import make_image, section
from PIL import Image

from library.dataset.buckets import BucketChooser
from library.dataset.images import (
    BLACK,
    Trait,
    fit,
    inspect_image,
    is_transparent,
    read_pixels,
    read_with_alpha,
    resize,
    to_model_range,
)
from library.options.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.avif"])
def test_the_size_is_read(tmp_path: Path, name: str) -> None:
    assert inspect_image(str(make_image(tmp_path / name, (50, 30)))).size == (50, 30)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.avif"])
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
    np.testing.assert_array_equal(read_pixels(str(path)), np.asarray(upright))


GREY16 = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)


def png_file(path: Path, pixels: np.ndarray, color: int, *chunks: tuple[bytes, bytes]) -> str:
    """Write a 16-bit PNG with further chunks, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels.reshape(height, -1))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0))
    body = b"".join(chunk(*further) for further in chunks) + chunk(b"IDAT", zlib.compress(rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b""))
    return str(path)


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    alpha = np.zeros(NOISE.shape[:2], np.uint8)
    alpha[:30], alpha[30:60] = 255, 128
    path = str(tmp_path / "a.png")
    Image.fromarray(np.dstack([NOISE, alpha])).save(path)
    pixels = read_pixels(path)
    np.testing.assert_array_equal(pixels[:30], NOISE[:30])
    assert (pixels[60:] == 255).all()
    half = NOISE[30:60] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(pixels[30:60] - half).max() <= 1
    assert (read_pixels(path, backdrop=BLACK)[60:] == 0).all()
    assert Trait.ALPHA in inspect_image(path).traits
    assert is_transparent(path)


def test_colours_under_transparent_parts_are_kept_beside_alpha(tmp_path: Path) -> None:
    alpha = np.linspace(0, 255, NOISE.shape[0] * NOISE.shape[1]).astype(np.uint8).reshape(NOISE.shape[:2])
    path = str(tmp_path / "a.png")
    Image.fromarray(np.dstack([NOISE, alpha])).save(path)
    np.testing.assert_array_equal(read_with_alpha(path), np.dstack([NOISE, alpha]))


def test_a_picture_that_could_be_transparent_but_is_not_stays_as_it_is(tmp_path: Path) -> None:
    path = str(tmp_path / "a.png")
    Image.fromarray(np.dstack([NOISE, np.full(NOISE.shape[:2], 255, np.uint8)])).save(path)
    np.testing.assert_array_equal(read_pixels(path), NOISE)
    assert not is_transparent(path)
    assert not is_transparent(str(make_image(tmp_path / "b.png")))
    assert (read_with_alpha(str(tmp_path / "b.png"))[..., 3] == 255).all()


@pytest.mark.parametrize("name", ["palette.png", "palette_alpha.png", "grey.png", "animated.webp", "colour.png"])
def test_all_ways_of_being_transparent_become_white(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    upper = np.zeros((8, 8), np.uint8)
    upper[:4] = 255
    rgba = np.dstack([np.full((8, 8, 3), 40, np.uint8), upper])
    if name == "palette.png":
        indexed = Image.fromarray((upper // 255).astype(np.uint8)).convert("P")
        indexed.putpalette([0, 0, 0, 40, 40, 40])
        indexed.save(path, transparency=0)
    elif name == "palette_alpha.png":
        Image.fromarray(rgba).quantize(4).save(path)
    elif name == "grey.png":
        Image.fromarray(rgba).convert("LA").save(path)
    elif name == "animated.webp":
        Image.fromarray(rgba).save(path, save_all=True, append_images=[Image.new("RGBA", (8, 8), "red")], lossless=True)
    else:
        colours = np.full((8, 8, 3), 40, np.uint8)
        colours[4:] = 7
        Image.fromarray(colours).save(path, transparency=(7, 7, 7))
    assert Trait.ALPHA in inspect_image(str(path)).traits
    pixels = read_pixels(str(path))
    assert (pixels[:4] == 40).all()
    assert (pixels[4:] == 255).all()


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(GREY16).save(tmp_path / "a.png")
    pixels = read_pixels(str(tmp_path / "a.png"), 1)
    np.testing.assert_array_equal(pixels[..., 0].ravel(), np.arange(256))
    assert Trait.SIXTEEN_BIT in inspect_image(str(tmp_path / "a.png")).traits


def test_one_grey_of_16_bits_may_stand_for_transparent(tmp_path: Path) -> None:
    path = png_file(tmp_path / "a.png", GREY16, 0, (b"tRNS", struct.pack(">H", 3 * 257)))
    expected = np.arange(256)
    expected[3] = 255
    np.testing.assert_array_equal(read_pixels(path)[..., 2].ravel(), expected)
    assert read_with_alpha(path)[0, 3].tolist() == [3, 3, 3, 0]


def test_16_bit_colour_is_scaled(tmp_path: Path) -> None:
    colours = np.dstack([GREY16, GREY16[::-1], GREY16.T])
    path = png_file(tmp_path / "a.png", colours, 2)
    np.testing.assert_array_equal(read_pixels(path), colours // 257)
    assert Trait.SIXTEEN_BIT in inspect_image(path).traits


def test_16_bit_transparency_is_scaled(tmp_path: Path) -> None:
    path = png_file(tmp_path / "a.png", np.dstack([GREY16, GREY16]), 4)
    np.testing.assert_array_equal(read_with_alpha(path), np.dstack([GREY16] * 4) // 257)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.avif"])
def test_the_first_frame_of_an_animation_is_used(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("#204060", "red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    facts = inspect_image(str(tmp_path / name))
    assert facts.size == (24, 16)
    assert Trait.ANIMATED in facts.traits
    pixels = read_pixels(str(tmp_path / name)).astype(int)
    assert np.abs(pixels - [0x20, 0x40, 0x60]).max() <= 8


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    smooth = Image.open(make_image(tmp_path / "smooth.png", (64, 48)))
    smooth.convert(mode).save(path, **({"quality": 98} if mode == "CMYK" else {}))
    pixels = read_pixels(str(path), inspect_image(str(path)).orientation)
    assert pixels.shape == (48, 64, 3)
    wanted = np.asarray(smooth.convert(mode).convert("RGB")).astype(int)
    assert np.abs(pixels - wanted).mean() < 2


def test_large_pictures_are_read_without_a_warning(tmp_path: Path) -> None:
    path = make_image(tmp_path / "a.png", (40, 40))
    code = (
        "from PIL import Image; from library.dataset.images import read_pixels; Image.MAX_IMAGE_PIXELS = 1000; read_pixels('a.png')"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=path.parent, env=environment, check=True)


def test_pictures_too_large_for_pillow_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    huge = make_image(tmp_path / "b.png", (60, 60))
    with pytest.raises(UserError, match=r"b\.png cannot be read: it has more than 2,000 pixels; shrink it"):
        inspect_image(str(huge))


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
    np.testing.assert_array_equal(fit(NOISE, geometry.bucket, geometry.placement, None), expected)


def test_pixels_become_minus_one_to_one() -> None:
    pixels = np.array([[[0, 255, 51]]], np.uint8)
    np.testing.assert_allclose(to_model_range(pixels)[:, 0, 0], [-1, 1, -0.6], atol=1e-6)
