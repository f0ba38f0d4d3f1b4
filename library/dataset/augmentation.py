"""What chance changes of a picture besides mirroring it: where it is cropped, and its colours.

What is drawn, how often and how strongly is as in sd-scripts, but for what is plainly an oversight there:

* gamma acts on values from 0 to 1 (there on 0 to 255, which brightens or darkens the picture a lot and cuts off its highlights);
* hue is turned in RGB (there with red and blue exchanged, which only turns it the other way round);
* faces are looked for in bucketed training too (there `face_crop_aug_range` does nothing with buckets), and a picture that is too
  small is enlarged to its training size (there it stops the run).

OpenCV turns the hue: its conversion in floating point is exact to half a level at 14 ms a megapixel, where Pillow's is up to 9
levels off at 45 ms, and numpy needs 110 ms.
"""

import os
from dataclasses import dataclass
from random import Random

import cv2
import numpy as np

from library.dataset.buckets import Geometry, Placement, Size
from library.dataset.images import Pixels
from library.options.dataset_config import SubsetConfig

_COLOR_RATE = 0.33
_HUE_RANGE = 8.0
_GAMMA_RANGE = 0.95, 1.05
_HUE_CIRCLE = 180


@dataclass(frozen=True, slots=True)
class ColorChange:
    """A small change of colour: of the hue or of the brightness curve, never of both."""

    hue_shift: float = 0.0
    """In units of two degrees, of which the colour circle has 180."""
    gamma: float = 1.0
    """Exponent of the pixel values, which lie in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Face:
    """Where a face is in a picture, in pixels."""

    center: tuple[int, int]
    size: int
    """The longer side of its box."""


def face_in_name(path: str) -> Face | None:
    """Return the face that a detector noted at the end of a file name (`name_cx_cy_w_h.png`), or None."""
    parts = os.path.splitext(os.path.basename(path))[0].split("_")
    if len(parts) < 5 or not all(part.isascii() and part.isdigit() for part in parts[-4:]):
        return None
    x, y, width, height = map(int, parts[-4:])
    return Face((x, y), max(width, height)) if x > 0 and max(width, height) > 0 else None


def draw_color_change(rng: Random) -> ColorChange | None:
    """Draw a colour change: none for two uses of three, else as often of the hue as of the brightness curve."""
    if rng.random() > _COLOR_RATE:
        return None
    if rng.random() > 0.5:
        return ColorChange(hue_shift=rng.uniform(-_HUE_RANGE, _HUE_RANGE))
    return ColorChange(gamma=rng.uniform(*_GAMMA_RANGE))


def draw_placement(rng: Random, path: str, size: Size, geometry: Geometry, subset: SubsetConfig, *, bucketed: bool) -> Placement:
    """Draw where a picture is cropped; nothing is drawn where its subset does not ask for it.

    Args:
        rng: takes the numbers.
        path: the file, whose name may tell of a face.
        size: of the picture.
        geometry: how it is placed without augmentation.
        subset: what is asked for; a picture without a face is cropped as without `face_crop_aug_range`.
        bucketed: whether its training size was chosen to suit it.
    """
    if subset.face_crop_aug_range and (face := face_in_name(path)):
        return draw_face_crop(rng, size, geometry.bucket, face, subset.face_crop_aug_range, random_crop=subset.random_crop)
    if subset.random_crop:
        return draw_crop(rng, size, geometry, bucketed=bucketed)
    return geometry.placement


def draw_crop(rng: Random, size: Size, geometry: Geometry, *, bucketed: bool) -> Placement:
    """Draw where the training size is cut out of a picture.

    Args:
        rng: takes a number for the width and then one for the height, each only where there is something to choose.
        size: of the picture.
        geometry: how it would be placed without augmentation.
        bucketed: whether its training size was chosen to suit it. If not, a picture that is large enough is not resized: the
            training size is a window into it.
    """
    bucket = geometry.bucket
    is_window = not bucketed and size[0] >= bucket[0] and size[1] >= bucket[1]
    resized = size if is_window else geometry.resized
    excess = resized[0] - bucket[0], resized[1] - bucket[1]
    left, top = (rng.randint(0, side) if side else 0 for side in excess)
    return Placement(resized, (left, top))


def draw_face_crop(
    rng: Random, size: Size, bucket: Size, face: Face, factors: tuple[float, float], *, random_crop: bool
) -> Placement:
    """Draw a crop around a face whose short side is so many times the size of the face; the picture is not enlarged for it.

    Args:
        rng: takes a number for the scale, then those for the horizontal and the vertical place.
        size: of the picture.
        bucket: the size to cut out.
        face: in pixels of the picture.
        factors: the crop's short side in sizes of the face, from and to.
        random_crop: the face may be anywhere in the crop, or outside of it, but mostly is near its middle. Otherwise a face of
            more than a tenth of the crop is moved from the middle by up to a twentieth of its size, unless both factors are equal.
    """
    cover = max(bucket[0] / size[0], bucket[1] / size[1])
    furthest, nearest = (min(1.0, min(bucket) / (face.size * factor)) for factor in (factors[1], factors[0]))
    lowest = max(cover, furthest)
    scale = rng.uniform(lowest, max(lowest, nearest))
    resized = tuple(max(wanted, int(side * scale + 0.5)) for wanted, side in zip(bucket, size, strict=True))
    moves = 0 if factors[0] == factors[1] or face.size * scale * 10 <= min(bucket) else int(face.size * scale) // 20
    crop = []
    for side, wanted, center in zip(resized, bucket, face.center, strict=True):
        middle = int(center * scale)
        if random_crop:
            reach = max(middle, side - middle)
            shift = rng.randint(0, reach) + rng.randint(0, reach) - reach
        else:
            shift = rng.randint(-moves, moves) if moves else 0
        crop.append(min(max(0, middle - wanted // 2 + shift), side - wanted))
    return Placement((resized[0], resized[1]), (crop[0], crop[1]))


def change_colors(pixels: Pixels, change: ColorChange) -> Pixels:
    """Return RGB pixels (H, W, 3) with their colours changed."""
    if change.gamma != 1.0:
        levels = (np.arange(256) / 255) ** change.gamma * 255
        pixels = np.rint(levels).astype(np.uint8)[pixels]
    if change.hue_shift != 0.0:
        hsv = cv2.cvtColor(pixels.astype(np.float32) / np.float32(255), cv2.COLOR_RGB2HSV)  # hue in degrees
        hsv[..., 0] = (hsv[..., 0] + change.hue_shift * 360 / _HUE_CIRCLE) % 360
        pixels = np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255).astype(np.uint8)
    return pixels
