"""Read size and orientation of a JPEG from a few hundred bytes of it.

Pillow needs some seventy microseconds a file for this, in which no other thread can run: a minute and more for a million images.
Here it is about ten. What is in any way unusual is left to Pillow, by giving nothing.
"""

import os
import struct
from struct import unpack_from

from library.dataset.images import ImageFacts, Trait

_READ_SIZE = 4096
_MOST_PIXELS = 80_000_000
"""Larger ones Pillow may refuse."""
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
"""Baseline, extended and progressive; other kinds are rare, and not all can be decoded."""
_SCAN = 0xDA
_LENGTHS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
"""Segments that are passed over: tables, comments, data of applications."""
_TRAITS = {1: Trait.GREY, 3: Trait.PLAIN, 4: Trait.CMYK}
_ORIENTATION = 0x0112
_SHORT = 3


def jpeg_facts(path: str) -> ImageFacts | None:
    """Return what `inspect_image` would, or None if only that can tell: for other formats, odd files and damaged ones."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError:
        return None
    try:
        return _facts(file)
    except (OSError, struct.error):
        return None
    finally:
        os.close(file)


def _facts(file: int) -> ImageFacts | None:
    data = os.read(file, _READ_SIZE)
    if data[:3] != b"\xff\xd8\xff" or not _has_end(file, data):
        return None
    start, place = 0, 2  # where the data begins in the file; the segment that is looked at
    size, traits, orientation = None, Trait.PLAIN, 0
    while True:
        if place - start + 10 > len(data):
            start, data = place, _read_at(file, place)
        mark, kind, length = unpack_from(">BBH", data, place - start)
        if mark != 0xFF or length < 2:
            return None
        if kind == _SCAN:
            break
        if kind in _FRAMES:
            bits, height, width, channels = unpack_from(">BHHB", data, place - start + 4)
            if size is not None or bits != 8 or channels not in _TRAITS or not 0 < width * height <= _MOST_PIXELS:
                return None
            size, traits = (width, height), _TRAITS[channels]
        elif kind == 0xE1:
            if place - start + 2 + length > len(data):
                start, data = place, _read_at(file, place, length + 2 + 10)
            found = _orientation(data[place - start + 4 : place - start + 2 + length])
            if found is None or (orientation and found):
                return None
            orientation = orientation or found
        elif kind not in _LENGTHS:
            return None
        place += 2 + length
    if size is None:
        return None
    return ImageFacts(size[::-1] if orientation >= 5 else size, orientation or 1, traits)


def _read_at(file: int, place: int, count: int = _READ_SIZE) -> bytes:
    os.lseek(file, place, os.SEEK_SET)
    return os.read(file, count)


def _has_end(file: int, head: bytes) -> bool:
    if len(head) < _READ_SIZE:
        return head[-2:] == b"\xff\xd9"
    os.lseek(file, -2, os.SEEK_END)
    return os.read(file, 2) == b"\xff\xd9"


def _orientation(segment: bytes) -> int | None:
    """Return the orientation that a segment of application data gives: 0 if it gives none, None if Pillow has to look."""
    if segment[:6] != b"Exif\0\0":
        return None if b"tiff:Orientation" in segment else 0
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(segment[6:10])
    if order is None:
        return None
    (entries,) = unpack_from(order + "I", segment, 10)
    (count,) = unpack_from(order + "H", segment, 6 + entries)
    for entry in range(6 + entries + 2, 6 + entries + 2 + 12 * count, 12):
        tag, kind, values, value = unpack_from(order + "HHIH", segment, entry)
        if tag == _ORIENTATION:
            return value if kind == _SHORT and values == 1 and 1 <= value <= 8 else None
    return 0
