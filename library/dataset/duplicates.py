"""Find files that are the same picture: one file listed under two names, or copies."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain

from library.dataset.folder_files import mapped

_SAMPLE = 4096
_CHUNK = 8


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
        candidates: groups of files of one size. Only what also agrees in a sample from the middle is read whole.
    """
    return list(_split(_split(candidates, _sample), _digest))


def _split(groups: Iterable[Sequence[str]], key: Callable[[str], bytes | None]) -> Iterator[list[str]]:
    """Divide groups by a property of their files, and give those that still have two."""
    kept = [list(group) for group in groups]
    paths = [path for group in kept for path in group]
    chunks = (range(start, min(start + _CHUNK, len(paths))) for start in range(0, len(paths), _CHUNK))
    keys = chain.from_iterable(mapped(lambda chunk: [key(path) for path in paths[chunk.start : chunk.stop]], chunks))
    for group in kept:
        parts: dict[Hashable, list[str]] = defaultdict(list)
        for path in group:
            found = next(keys)
            if found is not None:
                parts[found].append(path)
        yield from _several(parts)


def _several(groups: dict[int, list[str]] | dict[tuple[int, int], list[str]] | dict[Hashable, list[str]]) -> list[list[str]]:
    return [group for group in groups.values() if len(group) > 1]


def _sample(path: str) -> bytes | None:
    """Return some bytes from the middle: the beginnings of files of one camera or program are alike."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(os.fstat(file.fileno()).st_size // 2)
            return file.read(_SAMPLE)
    except OSError:
        return None


def _digest(path: str) -> bytes | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError:
        return None
