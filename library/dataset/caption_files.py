"""Find and read the caption beside an image."""

import os
import re
from collections import Counter
from collections.abc import Iterable

from library.options.errors import UserError

_USUAL_ENDINGS = (".txt", ".caption", ".tags")
_READ_SIZE = 1 << 16
_LINE_END = re.compile(r"\r\n|\r|\n")


def find_caption_file(image_path: str, extension: str) -> str | None:
    """Return the caption file of an image, or None.

    It has the image's name with `extension`; where there is none and the name ends in four numbers that a face detector added
    (`name_cx_cy_w_h.png`), the name without them.
    """
    stem = os.path.splitext(image_path)[0]
    return next((candidate for candidate in caption_candidates(stem, extension) if os.path.isfile(candidate)), None)


def caption_candidates(stem: str, extension: str) -> list[str]:
    """Return the names that the caption file of an image may have, the first that exists counts.

    Args:
        stem: the image without its ending.
        extension: of caption files.
    """
    if stem.count("_") < 4:
        return [stem + extension]
    return [stem + extension, stem.rsplit("_", 4)[0] + extension]


def caption_text(path: str) -> str:
    """Return all of a caption file.

    Raises:
        UserError: the file is empty or in another encoding.
    """
    text = read_text(path)
    if not text:
        raise UserError(
            f"{path} is an empty caption file. Write a caption into it, or a blank line if none is meant, or delete it."
        )
    return text


def caption_of_text(text: str, *, multiline: bool) -> str:
    """Return all lines that are not blank, stripped, or without `multiline` the first line; newlines end lines."""
    if multiline:
        return "\n".join(line.strip() for line in text.split("\n") if line.strip())
    return text.partition("\n")[0].strip()


def lines_of(text: str) -> list[str]:
    """Return the lines of a caption, at least one; only what editors take for the end of a line ends one, not U+2028."""
    return _LINE_END.split(text)


def read_text(path: str) -> str:
    """Return all of a text file, in UTF-8 with or without a byte order mark; whatever ends its lines becomes a newline.

    Raises:
        UserError: the file cannot be read or is in another encoding.
    """
    try:
        content = _content(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {_encoding_advice(content, error.start)}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _content(path: str) -> bytes:
    """Read a file without Python's buffers, which for a few words take longer than the reading."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        return b"".join(iter(lambda: os.read(file, _READ_SIZE), b""))
    finally:
        os.close(file)


def _encoding_advice(content: bytes, offset: int) -> str:
    line = content.count(b"\n", 0, offset) + 1
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it is UTF-16. Save it as UTF-8."
    return f"byte 0x{content[offset]:02x} at position {offset} (line {line}) is from another encoding. Save the file as UTF-8."


def likely_extension(without: Iterable[str], names: Iterable[str]) -> str:
    """Return a sentence about caption files under another ending, with a blank before it, or nothing where there are none.

    Args:
        without: names of images without a caption file.
        names: all names of their folder.
    """
    stems = {os.path.splitext(name)[0] for name in without}
    counts = Counter(ending for stem, ending in map(os.path.splitext, names) if stem in stems and ending in _USUAL_ENDINGS)
    if not counts:
        return ""
    ((ending, count),) = counts.most_common(1)
    return f' {ending} files lie beside {count} of them: set caption_extension = "{ending}" if they hold the captions.'
