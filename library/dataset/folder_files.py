"""The images and caption files of one folder: what earlier starts know of them, and for the rest the files themselves."""

import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from library.dataset.caption_files import caption_text as _read_caption
from library.dataset.formats import IMAGE_EXTENSIONS
from library.dataset.images import inspect_image
from library.dataset.index_store import IndexStore, packed_facts
from library.dataset.jpeg_header import jpeg_facts
from library.options.errors import UserError

logger = logging.getLogger(__name__)

_CHUNK = 64
_WAITING = 0.0003
"""Seconds a file from which on reading is mostly waiting, or work that lets other threads run, and threads pay."""
_THREADS = min(16, 4 * (os.cpu_count() or 1))
_SAVED_EVERY = 5.0
"""Seconds of reading that a kill loses at most, about."""
_MANY = 5000

Found = TypeVar("Found", int, str)
Result = TypeVar("Result")

Notes = dict[str, tuple[str, int, int, Found]]
"""What is known of files, by name: name, size in bytes, time of the last change, what was found out."""


class FolderFiles:
    """The files of a folder, whose names are read once.

    Args:
        folder: as it was given.

    Raises:
        OSError: there is no such folder.
    """

    def __init__(self, folder: str) -> None:
        self.prefix = os.path.join(folder, "")
        """What stands before the names."""
        self.real = os.path.realpath(folder)
        """The folder, the same from wherever it is seen, without separator at its end."""
        listed = os.listdir(folder or ".")
        self.names = frozenset(listed)
        """Of all files and folders."""
        self.images = [name for name in listed if name.lower().endswith(IMAGE_EXTENSIONS) and name[0] != "."]
        self.images.sort()
        """The names of all images, and of folders that are named as if they were images."""
        self.stems = [name[: name.rindex(".")] for name in self.images]
        """The same names without their endings."""
        self.store = IndexStore(self.real)
        """What is remembered of the files."""

    def image_facts(self, names: Sequence[str], problems: dict[str, str], noted: Notes[int] | None = None) -> list[int | None]:
        """Return what the headers of images say, packed, after checking that the files are whole; None for those left out.

        Args:
            names: of the images.
            problems: receives a sentence for each image that cannot be used, by name; a folder is left out without one.
            noted: what is known of images besides what is remembered here; receives what is true now.
        """
        if gone := {row[0] for row in self.store.notes()} - self.names:  # of caches, mostly, which nobody else looks for
            self.store.save(gone=gone)
        return self._looked_at(names, problems, self.store.images(), noted, _read_image, lambda rows: self.store.save(images=rows))

    def caption_texts(self, names: Sequence[str], problems: dict[str, str], noted: Notes[str] | None = None) -> list[str | None]:
        """Return the texts of caption files; None for those left out.

        Args:
            names: of the files.
            problems: receives a sentence for each file that cannot be used, by name.
            noted: as for images.
        """
        rows = self.store.captions()
        return self._looked_at(names, problems, rows, noted, _read_caption, lambda rows: self.store.save(captions=rows))

    def _looked_at(
        self,
        names: Sequence[str],
        problems: dict[str, str],
        known: list[tuple[str, int, int, Found]],
        noted: Notes[Found] | None,
        read: Callable[[str], Found],
        save: Callable[[list[tuple[str, int, int, Found]]], None],
    ) -> list[Found | None]:
        """Take what is known of files that are as they were, read the others, and save that."""
        rows: Sequence[tuple[str, int, int, Found] | None] = known
        if [row[0] for row in known] != names:
            by_name = {row[0]: row for row in known}
            if gone := by_name.keys() - self.names:
                self.store.save(gone=gone)
            rows = list(map({**(noted or {}), **by_name}.get, names))
        found: list[Found | None] = []
        new: list[tuple[str, int, int, Found]] = []
        saved_at, was_told = time.monotonic(), False
        chunks = [range(start, min(start + _CHUNK, len(names))) for start in range(0, len(names), _CHUNK)]
        try:
            for looked in mapped(partial(_look, self.prefix, names, rows, read), chunks):
                found += looked.found
                new += looked.new
                problems.update(looked.problems)
                if noted is not None:
                    noted.update(looked.noted())
                if not was_told and len(new) >= _MANY:
                    was_told = True
                    logger.info("Reading files of %s that are new or have changed.", self.prefix)
                if new and time.monotonic() - saved_at > _SAVED_EVERY:
                    save(new)
                    new, saved_at = [], time.monotonic()
        finally:
            if new:
                save(new)
        return found


@dataclass
class _Looked(Generic[Found]):
    """What was found out about some files."""

    names: Sequence[str] = ()
    statuses: Sequence[os.stat_result | None] = ()
    found: list[Found | None] = field(default_factory=list)
    new: list[tuple[str, int, int, Found]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)

    def noted(self) -> Notes[Found]:
        """Return the rows of all files that can be used."""
        rows = zip(self.names, self.statuses, self.found, strict=True)
        return {
            name: (name, status.st_size, status.st_mtime_ns, found)
            for name, status, found in rows
            if status is not None and found is not None
        }


def _look(
    prefix: str,
    names: Sequence[str],
    rows: Sequence[tuple[str, int, int, Found] | None],
    read: Callable[[str], Found],
    chunk: range,
) -> _Looked[Found]:
    own = slice(chunk.start, chunk.stop)
    paths = [prefix + name for name in names[own]]
    looked: _Looked[Found] = _Looked(names[own], _statuses(paths))
    looked.found = [
        row[3]
        if row is not None and status is not None and row[2] == status.st_mtime_ns and row[1] == status.st_size
        else _read_anew(path, path[len(prefix) :], status, read, looked)
        for path, row, status in zip(paths, rows[own], looked.statuses, strict=True)
    ]
    return looked


def _statuses(paths: Sequence[str]) -> Sequence[os.stat_result | None]:
    try:
        return list(map(os.stat, paths))
    except OSError:
        return [_status(path) for path in paths]


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:  # reading it will tell why
        return None


def _read_anew(
    path: str, name: str, status: os.stat_result | None, read: Callable[[str], Found], looked: _Looked[Found]
) -> Found | None:
    if status is not None and stat.S_ISDIR(status.st_mode):
        return None
    try:
        found = read(path)
    except UserError as error:
        looked.problems[name] = str(error)
        return None
    if status is not None:
        looked.new.append((name, status.st_size, status.st_mtime_ns, found))
    return found


def _read_image(path: str) -> int:
    facts = jpeg_facts(path) or inspect_image(path)
    return packed_facts(*facts.size, facts.orientation, facts.traits)


def mapped(work: Callable[[range], Result], chunks: Iterable[range]) -> Iterator[Result]:
    """Do work chunk by chunk, in threads once it turns out to be slow; where it is not, threads would only wait for each other."""
    left = iter(chunks)
    for chunk in left:
        start = time.perf_counter()
        result = work(chunk)
        seconds = time.perf_counter() - start
        yield result
        if seconds > _WAITING * len(chunk):
            break
    yield from _in_threads(work, left)


def _in_threads(work: Callable[[range], Result], chunks: Iterable[range]) -> Iterator[Result]:
    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield from pool.map(work, chunks)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # after Ctrl+C, what has not begun is not waited for
