"""Read pictures: check files without decoding them, decode, resize, crop.

Pixels come out as sd-scripts has them, so that caches of either are the same; only the orientation that a camera noted (EXIF) is
applied here and is not there.
"""

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from library.dataset.buckets import Geometry, Size
from library.dataset.formats import teach_pillow
from library.options.errors import UserError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""(H, W, 3) RGB."""

_TURNS: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_READ_SIZE = 1 << 20


class Trait(IntFlag):
    """What makes a picture other than plain 8-bit RGB."""

    PLAIN = 0
    SIXTEEN_BIT = 1
    """16 or 32 bits a channel."""
    CMYK = 2
    ANIMATED = 4
    """Several frames, of which the first is used."""
    ALPHA = 8
    GREY = 16


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the header of a picture says."""

    size: Size
    """Width and height as the picture is looked at, with the camera's orientation applied."""
    orientation: int
    """EXIF orientation, 1 (upright) to 8."""
    traits: Trait = Trait.PLAIN


def inspect_image(path: str) -> ImageFacts:
    """Read a picture's size and check that the file is whole.

    PNG chunks are checked against their checksums, JPEG and WebP files for their end; where that does not settle it, and for all
    other formats, the picture is decoded.

    Raises:
        UserError: the file is missing, empty, cut off, damaged or no picture.
    """
    try:
        if os.path.getsize(path) == 0:
            raise UserError(f"{path} is empty (0 bytes).")
        teach_pillow(path)
        with Image.open(path) as image:
            traits = _traits(image)
            is_whole = _WHOLENESS.get(image.format or "", _cannot_tell)
            with open(path, "rb") as file:
                whole = is_whole(file)
            if not whole:
                image.load()
            orientation = _orientation(image)
            size = image.size[::-1] if orientation in _SIDEWAYS else image.size
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a picture, or is damaged at its beginning.") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}.") from None
    return ImageFacts((size[0], size[1]), orientation, traits)


def read_pixels(path: str, orientation: int) -> Pixels:
    """Decode a picture to upright RGB; transparency is dropped, 16-bit grey is scaled to 8 bits.

    Raises:
        UserError: the file cannot be decoded.
    """
    try:
        teach_pillow(path)
        with Image.open(path) as image:
            image.load()
            upright = image if orientation == 1 else image.transpose(_TURNS[orientation])
            return _as_rgb(upright)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}.") from None


def fit(pixels: Pixels, geometry: Geometry, interpolation: str | None) -> Pixels:
    """Resize and crop a picture to its bucket."""
    resized = resize(pixels, geometry.resized, interpolation)
    (left, top), (width, height) = geometry.crop, geometry.bucket
    return resized[top : top + height, left : left + width]


def resize(pixels: Pixels, size: Size, interpolation: str | None) -> Pixels:
    """Resize to (width, height).

    Args:
        pixels: (H, W, 3).
        size: the new width and height.
        interpolation: a name of `RESAMPLERS`; None takes `area` if no side grows, else `lanczos`.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if interpolation is None:
        interpolation = "area" if width >= size[0] and height >= size[1] else "lanczos"
    return RESAMPLERS[interpolation](pixels, size)


def to_model_range(pixels: Pixels) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Turn (H, W, 3) bytes into (3, H, W) float32 in [-1, 1]."""
    scaled = pixels.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(((scaled - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1))


def _with_pillow(filter_: Image.Resampling) -> Callable[[Pixels, Size], Pixels]:
    return lambda pixels, size: np.asarray(Image.fromarray(pixels).resize(size, filter_))


def _with_opencv(flag: int) -> Callable[[Pixels, Size], Pixels]:
    return lambda pixels, size: np.asarray(cv2.resize(pixels, size, interpolation=flag), dtype=np.uint8)


RESAMPLERS: dict[str, Callable[[Pixels, Size], Pixels]] = {
    "lanczos": _with_pillow(Image.Resampling.LANCZOS),
    "box": _with_pillow(Image.Resampling.BOX),
    "nearest": _with_opencv(cv2.INTER_NEAREST_EXACT),
    "bilinear": _with_opencv(cv2.INTER_LINEAR),
    "linear": _with_opencv(cv2.INTER_LINEAR),
    "bicubic": _with_opencv(cv2.INTER_CUBIC),
    "cubic": _with_opencv(cv2.INTER_CUBIC),
    "area": _with_opencv(cv2.INTER_AREA),
}


def _orientation(image: Image.Image) -> int:
    exif = Image.Image.getexif(image)  # the method of PNG images decodes them
    value = exif.get(ExifTags.Base.Orientation, 1)
    return value if value in _TURNS else 1


def _traits(image: Image.Image) -> Trait:
    """Return what the header says; to be asked before the pixels are decoded."""
    mode = image.mode
    tile = getattr(image, "tile", None)
    raw = str(tile[0][3]) if tile else ""  # of 16-bit colour, which Pillow decodes to 8, only the decoder's name tells
    traits = Trait.PLAIN
    if mode.startswith(("I", "F")) or ";16" in raw:
        traits |= Trait.SIXTEEN_BIT
    if mode == "CMYK":
        traits |= Trait.CMYK
    if getattr(image, "is_animated", False) and image.format != "MPO":  # the second picture of a phone's MPO is no frame
        traits |= Trait.ANIMATED
    if image.has_transparency_data:
        traits |= Trait.ALPHA
    if mode in ("1", "L", "LA") or mode.startswith(("I", "F")):
        traits |= Trait.GREY
    return traits


def _as_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.float64)
        levels = np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8)
        return np.repeat(levels[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def _png_is_whole(file: BinaryIO) -> bool:
    """Walk the chunks, comparing each checksum, to the end chunk; EXIF data behind the pixels is left to the decoder."""
    if file.read(len(_PNG_SIGNATURE)) != _PNG_SIGNATURE:
        return False
    has_pixels = False
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf" and has_pixels:
            return False
        has_pixels = has_pixels or kind == b"IDAT"
        checksum = zlib.crc32(kind)
        for start in range(0, length, _READ_SIZE):
            checksum = zlib.crc32(file.read(min(_READ_SIZE, length - start)), checksum)
        if file.read(4) != struct.pack(">I", checksum) and kind[:1].isupper():  # lower case: text and the like, not pixels
            raise OSError(f"its {kind.decode('latin-1')} chunk is damaged or cut off")
        if kind == b"IEND":
            return True
    return False


def _jpeg_is_whole(file: BinaryIO) -> bool:
    file.seek(-2, os.SEEK_END)
    return file.read(2) == b"\xff\xd9"


def _webp_is_whole(file: BinaryIO) -> bool:
    head = file.read(12)
    file.seek(0, os.SEEK_END)
    return file.tell() >= int(struct.unpack("<I", head[4:8])[0]) + 8


def _cannot_tell(file: BinaryIO) -> bool:
    del file
    return False


_WHOLENESS: dict[str, Callable[[BinaryIO], bool]] = {"PNG": _png_is_whole, "JPEG": _jpeg_is_whole, "WEBP": _webp_is_whole}
"""By format: whether the file is whole, as far as can be told without decoding."""


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
