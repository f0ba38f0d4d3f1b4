"""Tell whether a picture file is whole without decoding it, as far as its format allows."""

import os
import struct
import zlib
from collections.abc import Callable
from typing import BinaryIO

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_READ_SIZE = 1 << 20


def is_whole(file: BinaryIO, format_: str) -> bool:
    """Say whether a file is whole; False where only decoding it can tell.

    Args:
        file: at its beginning.
        format_: as Pillow names it.

    Raises:
        OSError: it is damaged.
    """
    check = _CHECKS.get(format_)
    return check is not None and check(file)


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


_CHECKS: dict[str, Callable[[BinaryIO], bool]] = {"PNG": _png_is_whole, "JPEG": _jpeg_is_whole, "WEBP": _webp_is_whole}
"""By format: whether the file is whole, as far as can be told without decoding."""
