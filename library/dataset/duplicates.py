"""Find files that are the same picture: one file listed under two names, or copies."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

from library.dataset.folder_files import mapped

_SMALL = 8192
"""Bytes up to which a file is read whole at once: looking into it twice would take longer."""
_SAMPLE = 4096
_DIGEST_SIZE = 16
_CHUNK = 8

_Key = TypeVar("_Key", bound=Hashable)


def same_files(paths: Iterable[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Return groups of paths that lead to one file, and groups of files of one size, which may be copies of each other.

    Args:
        paths: each once; those that are gone are left out. Their contents are not looked at.
    """
    by_file: dict[tuple[int, int], list[str]] = defaultdict(list)
    by_size: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            continue
        names = by_file[status.st_dev, status.st_ino]
        names.append(path)
        if len(names) == 1:
            by_size[status.st_size].append(path)
    return _several(by_file), _several(by_size)


def same_contents(candidates: Iterable[Sequence[str]]) -> list[list[str]]:
    """Return groups of files with the same content.

    Args:
        candidates: groups of files of one size. Of large ones only what also agrees in a sample from the middle is read whole.
    """
    same: list[list[str]] = []
    sampled: list[list[str]] = []
    for (is_whole, _), group in _split(candidates, _sample):
        (same if is_whole else sampled).append(group)
    return same + [group for _, group in _split(sampled, _digest)]


def _split(groups: Iterable[Sequence[str]], key: Callable[[str], _Key | None]) -> Iterator[tuple[_Key, list[str]]]:
    """Divide groups by a property of their files, and give those that still have two, with the property."""
    kept = [list(group) for group in groups]
    paths = [path for group in kept for path in group]
    chunks = (range(start, min(start + _CHUNK, len(paths))) for start in range(0, len(paths), _CHUNK))
    keys = chain.from_iterable(mapped(lambda chunk: [key(path) for path in paths[chunk.start : chunk.stop]], chunks))
    for group in kept:
        parts: dict[_Key, list[str]] = defaultdict(list)
        for path in group:
            found = next(keys)
            if found is not None:
                parts[found].append(path)
        yield from ((found, part) for found, part in parts.items() if len(part) > 1)


def _several(groups: dict[int, list[str]] | dict[tuple[int, int], list[str]]) -> list[list[str]]:
    return [group for group in groups.values() if len(group) > 1]


def _sample(path: str) -> tuple[bool, bytes] | None:
    """Return whether a file is small, and the digest of all of it or of some bytes from its middle.

    The beginnings of files of one camera or program are alike.
    """
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError:
        return None
    try:
        size = os.fstat(file).st_size
        is_small = size <= _SMALL
        if not is_small:
            os.lseek(file, size // 2, os.SEEK_SET)
        data = os.read(file, _SMALL if is_small else _SAMPLE)
        return is_small, hashlib.blake2b(data, digest_size=_DIGEST_SIZE).digest()
    except OSError:
        return None
    finally:
        os.close(file)


def _digest(path: str) -> bytes | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_SIZE)).digest()
    except OSError:
        return None
