"""Read pictures: check files without decoding them, decode, resize, crop.

Pixels come out as sd-scripts has them, so that caches of either are the same, but for what is wrong there: the orientation that a
camera noted (EXIF) is applied, transparent parts become white instead of whatever colour hides under them, and 16-bit grey is
scaled instead of clipped.

OpenCV resizes where sd-scripts does it with OpenCV: on a smooth picture shrunk by a quarter, Pillow's box filter is up to 44 levels
away from its area averages, and the nearest of Pillow's filters 10; caches would no longer be the same.
"""

import os
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from library.dataset.buckets import Placement, Size
from library.dataset.formats import teach_pillow
from library.dataset.wholeness import is_whole
from library.options.errors import UserError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""(H, W, 3) RGB, or (H, W, 4) with alpha."""

WHITE, BLACK = 255, 0
SIDE_LIMIT = 1 << 24
"""A picture's width and height stay below: what the index holds of one goes into a single number."""

# Training images are the user's own, and large ones are usual; Pillow still refuses twice its limit.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

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
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, Image.DecompressionBombError)
"""What Pillow and its plug-ins raise over damaged files."""


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
        UserError: the file is missing, empty, cut off, damaged, no picture, or longer than any is taken.
    """
    try:
        is_empty = os.path.getsize(path) == 0
    except OSError as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}.") from None
    if is_empty:
        raise UserError(f"{path} is empty (0 bytes).")
    try:
        teach_pillow(path)
        with Image.open(path) as image:
            traits = _traits(image)
            with open(path, "rb") as file:
                if not is_whole(file, image.format or ""):
                    image.load()
            orientation = _orientation(image)
            size = image.size[::-1] if orientation in _SIDEWAYS else image.size
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a picture, or is damaged at its beginning.") from None
    except _UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}.") from None
    if max(size) >= SIDE_LIMIT:
        raise UserError(f"{path} is {size[0]}x{size[1]}; sides of {SIDE_LIMIT:,} pixels and more are not taken. Shrink or cut it.")
    return ImageFacts((size[0], size[1]), orientation, traits)


def read_pixels(path: str, orientation: int | None = None, *, backdrop: int = WHITE) -> Pixels:
    """Decode a picture to upright RGB, (H, W, 3).

    Args:
        path: the file.
        orientation: its EXIF orientation; None takes it from the file.
        backdrop: the grey on which transparent parts are put.

    Raises:
        UserError: the file cannot be decoded.
    """
    pixels = _decode(path, orientation)
    if pixels.shape[-1] == 3:
        return pixels
    ground = Image.new("RGB", (pixels.shape[1], pixels.shape[0]), (backdrop,) * 3)
    ground.paste(Image.fromarray(pixels[..., :3]), mask=Image.fromarray(pixels[..., 3]))
    return np.asarray(ground)


def read_with_alpha(path: str, orientation: int | None = None) -> Pixels:
    """Decode a picture to upright RGBA, (H, W, 4); transparent parts keep the colour that hides under them.

    Raises:
        UserError: the file cannot be decoded.
    """
    pixels = _decode(path, orientation)
    return pixels if pixels.shape[-1] == 4 else np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])


def is_transparent(path: str) -> bool:
    """Say whether any part of a picture is transparent.

    Raises:
        UserError: the file cannot be decoded.
    """
    pixels = _decode(path, 1)
    return pixels.shape[-1] == 4 and int(pixels[..., 3].min()) < 255


def fit(pixels: Pixels, bucket: Size, placement: Placement, interpolation: str | None) -> Pixels:
    """Resize and crop a picture to its training size; transparency goes with it."""
    resized = resize(pixels, placement.resized, interpolation)
    (left, top), (width, height) = placement.crop, bucket
    return resized[top : top + height, left : left + width]


def load_placed(
    path: str, orientation: int, bucket: Size, placement: Placement, interpolation: str | None, *, with_mask: bool
) -> tuple[Pixels, Pixels | None]:
    """Decode a picture and bring it to its training size.

    Returns:
        RGB (H, W, 3), transparent parts white; with_mask, RGB as it is under transparent parts, and alpha (H, W).

    Raises:
        UserError: the file cannot be decoded.
    """
    pixels = read_with_alpha(path, orientation) if with_mask else read_pixels(path, orientation)
    placed = fit(pixels, bucket, placement, interpolation)
    return (placed[..., :3], placed[..., 3]) if with_mask else (placed, None)


def resize(pixels: Pixels, size: Size, interpolation: str | None) -> Pixels:
    """Resize to (width, height).

    Args:
        pixels: (H, W, 3), or (H, W, 4) with alpha.
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


def to_mask(alpha: Pixels) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Turn alpha bytes (H, W) into float32 in [0, 1]."""
    return alpha.astype(np.float32) / np.float32(255)


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


def _decode(path: str, orientation: int | None) -> Pixels:
    """Return RGB, or RGBA where parts may be transparent."""
    try:
        teach_pillow(path)
        with Image.open(path) as image:
            image.load()
            turn = _TURNS.get(_orientation(image) if orientation is None else orientation)
            upright = image.transpose(turn) if turn is not None else image
            return _as_bytes(upright)
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a picture, or is damaged at its beginning.") from None
    except _UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}.") from None


def _as_bytes(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        return _deep_grey_as_bytes(image)
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _deep_grey_as_bytes(image: Image.Image) -> Pixels:
    """Scale 16-bit grey, which Pillow would clip; one grey of a PNG may stand for transparent."""
    grey = np.asarray(image, dtype=np.float64)
    levels = np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    alpha = [] if transparent is None else [np.where(grey == transparent, 0, 255).astype(np.uint8)]
    return np.dstack([levels, levels, levels, *alpha])


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; shrink it"
    if type(error) is RuntimeError:  # of plug-ins, which speak of their own build
        return "it is damaged or cut off"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
