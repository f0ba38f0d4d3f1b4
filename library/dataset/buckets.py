"""Aspect-ratio buckets: which size a picture is trained at, how it is resized and cropped to it, and the sizes SDXL is told.

Sizes are (width, height) in pixels. The arithmetic, down to each floor and rounding, is that of sd-scripts: models and caches
in the field depend on it.
"""

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from library.dataset.columns import Ints
from library.options.dataset_config import SectionConfig, bucket_limits

Size = tuple[int, int]

_MOST_CUT_OFF = 64
"""Times the area of its bucket that a picture may have when it covers it; what is beyond is cut off, and costs memory before."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How the pixels of a picture get into its training size."""

    resized: Size
    """The size it is resized to; at least the training size in both directions."""
    crop: Size
    """Left and top of the training size inside the resized picture."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How one picture gets to its training size."""

    bucket: Size
    """The size it is trained at."""
    resized: Size
    """The size it is resized to; at least the bucket in both directions."""
    crop: Size
    """Left and top of the bucket inside the resized picture: the centre."""
    crop_ltrb: tuple[float, float, float, float]
    """Left, top, right, bottom as SDXL is conditioned on them; not the pixel crop (see `conditioning_crop`)."""

    @property
    def placement(self) -> Placement:
        """The placement without augmentation."""
        return Placement(self.resized, self.crop)


def bucket_sizes(resolution: Size, lowest: int, highest: int, step: int) -> list[Size]:
    """Return all buckets, sorted by width and then height.

    Args:
        resolution: only its area matters.
        lowest: smallest side, a multiple of step.
        highest: largest side, a multiple of step.
        step: every side is a multiple of it.
    """
    area = resolution[0] * resolution[1]
    square = int(math.sqrt(area)) // step * step
    sizes = {(square, square)}
    for width in range(lowest, highest + 1, step):
        height = min(highest, area // width // step * step)
        if height >= lowest:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def nearest_bucket(size: Size, buckets: list[Size]) -> Size:
    """Return the size itself if it is a bucket, else the bucket whose width/height is nearest; the first one on ties."""
    if size in buckets:
        return size
    ratio = size[0] / size[1]
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))


def cover(size: Size, target: Size) -> Size:
    """Return `size` scaled, in proportion, to just cover `target`."""
    (width, height), (target_width, target_height) = size, target
    scale = target_height / height if width / height > target_width / target_height else target_width / width
    return int(width * scale + 0.5), int(height * scale + 0.5)


def shrunk_to_area(size: Size, area: int, step: int) -> Size:
    """Return `size`, scaled down if its area is above `area` so that one side is a multiple of `step`; never scaled up."""
    width, height = size
    if width * height <= area:
        return size
    ratio = width / height
    ideal_width = math.sqrt(area * ratio)
    width_first = _floored(ideal_width, step)
    height_first = _floored(area / ideal_width, step)
    by_width = (width_first, _floored(width_first / ratio, step))
    by_height = (_floored(height_first * ratio, step), height_first)
    if _ratio_error(by_width, ratio) < _ratio_error(by_height, ratio):
        return width_first, int(width_first / ratio + 0.5)
    return int(height_first * ratio + 0.5), height_first


def _floored(side: float, step: int) -> int:
    return int(side + 0.5) // step * step


def _ratio_error(size: Size, ratio: float) -> float:
    return abs(size[0] / size[1] - ratio) if size[1] else math.inf


def conditioning_crop(size: Size, bucket: Size) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom as SDXL is conditioned on them.

    The picture's own aspect is fitted inside the bucket and centred. This does not describe the crop that is made, but it is what
    models trained with sd-scripts, and the caches of their users, carry.
    """
    ratio = size[0] / size[1]
    width, height = bucket
    fitted_width, fitted_height = (height * ratio, float(height)) if width / height > ratio else (float(width), width / ratio)
    left, top = (width - fitted_width) // 2, (height - fitted_height) // 2
    return left, top, left + fitted_width, top + fitted_height


def _is_lost(ratio: Any, bucket_ratio: Any) -> Any:
    """Say whether next to nothing is left of a picture of one width/height in a bucket of another; also of arrays of them."""
    return (ratio > _MOST_CUT_OFF * bucket_ratio) | (bucket_ratio > _MOST_CUT_OFF * ratio)


def crop_top_left(geometry: Geometry, flipped: bool) -> tuple[int, int]:
    """Return (top, left) for the conditioning; mirrored, left is counted from the other side."""
    left, top, right, _ = geometry.crop_ltrb
    return int(top), int(geometry.bucket[0] - right) if flipped else int(left)


def true_crop_top_left(bucket: Size, placement: Placement, flipped: bool) -> tuple[int, int]:
    """Return (top, left) of the crop that is made, in pixels of the resized, and where it is flipped mirrored, picture."""
    left, top = placement.crop
    return top, placement.resized[0] - bucket[0] - left if flipped else left


def true_crop_ltrb(geometry: Geometry) -> tuple[float, float, float, float]:
    """Return the crop that is made as programs that read `crop_ltrb` from a cache take it: both ways give `true_crop_top_left`."""
    (left, top), (width, height) = geometry.crop, geometry.bucket
    right = width - (geometry.resized[0] - width - left)
    bottom = height - (geometry.resized[1] - height - top)
    return float(left), float(top), float(right), float(bottom)


class BucketChooser:
    """Gives each picture of a dataset its geometry."""

    def __init__(self, section: SectionConfig) -> None:
        self._section = section
        self._area = section.resolution[0] * section.resolution[1]
        self._sizes = [section.resolution]
        self._keeps_size = section.enable_bucket and section.bucket_no_upscale
        if section.enable_bucket and not self._keeps_size:
            self._sizes = bucket_sizes(section.resolution, *bucket_limits(section), section.bucket_reso_steps)

    def choose(self, size: Size) -> Geometry:
        """Return the geometry of a picture.

        Raises:
            ValueError: the picture is too small for a bucket without being enlarged, or so narrow that hardly any of it would be
                seen; the text says what to do.
        """
        return self.geometry(size, self.bucket(size))

    def bucket(self, size: Size) -> Size:
        """Return the bucket of a picture.

        Raises:
            ValueError: as of `choose`.
        """
        if not self._keeps_size:
            bucket = nearest_bucket(size, self._sizes)
            if _is_lost(size[0] / size[1], bucket[0] / bucket[1]):
                raise ValueError(
                    f"it is {size[0]}x{size[1]}, of which next to nothing is left in a bucket of {bucket[0]}x{bucket[1]}. "
                    f"Remove it, or cut it into pieces"
                )
            return bucket
        step = self._section.bucket_reso_steps
        resized = shrunk_to_area(size, self._area, step)
        bucket = resized[0] // step * step, resized[1] // step * step
        if 0 in bucket:
            raise ValueError(
                f"it is {size[0]}x{size[1]}, which is too small or too narrow for a bucket of {step} pixels. "
                f"Remove it, or switch bucket_no_upscale off"
            )
        return bucket

    def geometry(self, size: Size, bucket: Size) -> Geometry:
        """Return the geometry of a picture whose bucket is known."""
        step = self._section.bucket_reso_steps
        resized = shrunk_to_area(size, self._area, step) if self._keeps_size else cover(size, bucket)
        crop = (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2
        return Geometry(bucket, resized, crop, conditioning_crop(size, bucket))

    def buckets(self, sizes: Ints) -> Ints:
        """Return the buckets of many pictures; (0, 0) for those that `choose` refuses.

        Args:
            sizes: (N, 2), widths and heights.
        """
        keys, kind = np.unique(sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1], return_inverse=True)
        kinds = np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1).astype(np.int32)
        chosen: Ints = (self._without_upscaling(kinds) if self._keeps_size else self._nearest(kinds))[kind]
        return chosen

    def resized(self, sizes: Ints, buckets: Ints) -> Ints:
        """Return to what many pictures are resized.

        Args:
            sizes: (N, 2), widths and heights.
            buckets: theirs, as `buckets` returned them.
        """
        if self._keeps_size:
            keys, kind = np.unique(sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1], return_inverse=True)
            step = self._section.bucket_reso_steps
            kinds = [shrunk_to_area((key >> 32, key & 0xFFFFFFFF), self._area, step) for key in keys.tolist()]
            return np.array(kinds, dtype=np.int32).reshape(-1, 2)[kind]
        (width, height), (bucket_width, bucket_height) = sizes.T, buckets.T  # from here on what `cover` does, in its arithmetic
        is_wider = width / height > bucket_width / bucket_height
        scale = np.where(is_wider, bucket_height / height, bucket_width / width)
        covering: Ints = (sizes * scale[:, None] + 0.5).astype(np.int32)
        return covering

    def _nearest(self, sizes: Ints) -> Ints:
        """Do what `nearest_bucket` does, in the same arithmetic."""
        ratios = sizes[:, 0] / sizes[:, 1]
        nearest = np.full(len(sizes), 0)
        least = np.full(len(sizes), np.inf)
        for number, (width, height) in enumerate(self._sizes):
            error = np.abs(width / height - ratios)
            error[(sizes[:, 0] == width) & (sizes[:, 1] == height)] = -1
            is_nearer = error < least
            nearest[is_nearer], least[is_nearer] = number, error[is_nearer]
        chosen: Ints = np.array(self._sizes, dtype=np.int32)[nearest]
        chosen[_is_lost(ratios, chosen[:, 0] / chosen[:, 1])] = 0
        return chosen

    def _without_upscaling(self, sizes: Ints) -> Ints:
        buckets = np.zeros_like(sizes)
        for position, (width, height) in enumerate(sizes.tolist()):
            with suppress(ValueError):
                buckets[position] = self.bucket((width, height))
        return buckets
