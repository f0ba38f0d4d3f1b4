"""Read back from the pixels of a picture what it shows: the colour of the ground, and colour and shape of what lies on it.

The ground is the palette colour nearest to the median of a frame along the edges. The object is every pixel further than `FAR`
from the ground's own colour, in patches of at least `SMALLEST` pixels. Its colour is the palette colour nearest to the median of
its inner pixels; it is striped where a quarter of them or more is nearest to black and another quarter to white. Its shape is that
of the drawn example whose outline, brought to the same box, covers most of the same pixels (intersection over union).
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

from drawing import COLOURS, SHAPES, Scene, draw

FRAME = 5
"""Width in pixels of the frame that the ground is read from."""
FAR = 70.0
"""Distance in RGB, 0 to 441, beyond which a pixel is not the ground's."""
SMALLEST = 30
"""Pixels of the smallest patch that counts."""
_BOX = 48
_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)

Mask = NDArray[np.uint8]


@dataclass(frozen=True)
class Reading:
    """What a picture shows; colour and shape are empty where there is no object."""

    ground: str
    colour: str = ""
    shape: str = ""

    def fits(self, scene: Scene) -> tuple[bool, bool, bool]:
        """Tell whether the ground, the object's colour and its shape are those of a scene."""
        return self.ground == scene.ground, self.colour == scene.colour, self.shape == scene.shape


def read_picture(picture: Image.Image) -> Reading:
    """Read a picture of the toy's world."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    ground = ground_colour(pixels)
    mask = object_mask(pixels, ground)
    if not mask.any():
        return Reading(nearest_colour(ground))
    return Reading(nearest_colour(ground), object_colour(pixels, mask), object_shape(mask))


def ground_colour(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the ground's own colour (3,), from pixels (height, width, 3)."""
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    return np.asarray(np.median(pixels[frame], axis=0), dtype=np.float32)


def object_pixels(picture: Image.Image) -> Mask:
    """Return 1 where the object of a picture is."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return object_mask(pixels, ground_colour(pixels))


def object_mask(pixels: NDArray[np.float32], ground: NDArray[np.float32]) -> Mask:
    """Return 1 where the object is: (height, width), from pixels (height, width, 3) and the ground's colour (3,)."""
    far = (np.linalg.norm(pixels - ground, axis=2) > FAR).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(far, connectivity=4)
    large = [number for number in range(1, count) if stats[number, cv2.CC_STAT_AREA] >= SMALLEST]
    return np.isin(labels, large).astype(np.uint8)


def object_colour(pixels: NDArray[np.float32], mask: Mask) -> str:
    """Return the colour word of the masked pixels, or "striped"."""
    inner = cv2.erode(mask, np.ones((5, 5), np.uint8))
    inside = pixels[(inner if inner.sum() >= SMALLEST else mask).astype(bool)]
    nearest = np.linalg.norm(inside[:, None] - _PALETTE, axis=2).argmin(axis=1)
    shares = {name: float((nearest == number).mean()) for number, name in enumerate(_NAMES)}
    if shares["black"] >= 0.25 and shares["white"] >= 0.25:
        return "striped"
    return nearest_colour(np.median(inside, axis=0))


def nearest_colour(rgb: NDArray[np.float32]) -> str:
    """Return the colour word nearest to an RGB colour."""
    return _NAMES[int(np.linalg.norm(_PALETTE - rgb, axis=1).argmin())]


def object_shape(mask: Mask) -> str:
    """Return the shape whose example covers most of the same pixels."""
    box = boxed(mask)
    return max(SHAPES, key=lambda shape: overlap(box, _example(shape)))


def boxed(mask: Mask) -> Mask:
    """Cut a mask to what it holds, and bring that to a fixed size."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return (cv2.resize(cut * 255, (_BOX, _BOX), interpolation=cv2.INTER_AREA) > 127).astype(np.uint8)


def overlap(one: Mask, other: Mask) -> float:
    """Return the intersection over union of two masks of the same size."""
    return float((one & other).sum() / max(1, (one | other).sum()))


@functools.cache
def _example(shape: str) -> Mask:
    pixels = np.asarray(draw(Scene(shape, "white", "black", "large")), dtype=np.float32)
    return boxed(object_mask(pixels, np.array(COLOURS["black"], dtype=np.float32)))
