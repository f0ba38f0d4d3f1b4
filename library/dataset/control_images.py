"""Find the control or mask image of every image: the file of the same name, whatever its ending, in another folder."""

import os
from collections.abc import Mapping
from dataclasses import replace

from library.dataset.buckets import Size
from library.dataset.columns import Pictures, Texts
from library.dataset.findings import Findings, Kind, names_of


def with_controls(
    pictures: Pictures, folder: str, sizes: Mapping[str, Size | None], findings: Findings, *, bucketed: bool
) -> Pictures:
    """Return the images of a subset with their control images.

    Args:
        pictures: of the subset.
        folder: of the control images.
        sizes: of the images in it by path, in the order of names; None for those that cannot be read. Of two that differ in the
            ending alone, the first is taken.
        findings: receives every image without a control image, every pair that cannot lie on each other pixel by pixel, and what is
            left over.
        bucketed: with buckets, sizes must be equal; without, only shapes, since there control images of another size are usual.
    """
    by_stem = {_stem(control): control for control in reversed(list(sizes))}
    paired = []
    for row in range(len(pictures)):
        image = pictures.path(row)
        control = by_stem.get(_stem(image))
        paired.append(control or "")
        if control is None:
            told = f"{image} has no control or mask image: {folder} has no image named {_stem(image)}. Add it, or remove the image."
            findings.error(Kind.CONDITIONING, image, told)
            continue
        size, other = _pair(pictures.sizes[row].tolist()), sizes[control]
        if other is not None and not (size == other or (not bucketed and _same_shape(size, other))):
            advice = "Make them equal." if bucketed else "Give them the same shape."
            told = f"{control} is {other[0]}x{other[1]}, but its image {image} is {size[0]}x{size[1]}. {advice}"
            findings.error(Kind.CONDITIONING, control, told)
    used = set(paired)
    _report_unused(folder, [control for control in sizes if control not in used], len(sizes), findings)
    return replace(pictures, conditioning=Texts(paired))


def _report_unused(folder: str, unused: list[str], count: int, findings: Findings) -> None:
    if unused:
        names = names_of([os.path.basename(control) for control in unused])
        told = f"{len(unused)} of {count} images in {folder} belong to no image and are not used: {names}."
        findings.warning(Kind.UNUSED_CONTROL, folder, told, count=len(unused), files=unused)


def _same_shape(size: Size, other: Size) -> bool:
    """Say whether one is the other, resized and rounded to whole pixels."""
    return abs(size[0] * other[1] - other[0] * size[1]) <= max(*size, *other)


def _pair(values: list[int]) -> Size:
    return values[0], values[1]


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]
