"""Notes in cache files on what they were made from, and the account of what had to be made again."""

import io
import json
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from library.dataset.file_notes import FileNotes
from library.files.hashes import sha256_file
from library.files.npz import DAMAGE, parse_array
from library.options.errors import UserError

STAMP_NAME = "atelier_stamp"
"""The array that holds a stamp; programs that do not know it ignore it."""

STAMP_FORMAT = 1

_Made = TypeVar("_Made")

Stamp = dict[str, Any]
"""What an entry was made from, and the checksums of its arrays."""


def add_stamp(arrays: Mapping[str, np.ndarray[Any, Any]], stamp: Stamp) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of an entry with a stamp that holds for exactly these arrays."""
    sealed = stamp | {"checksums": {name: _checksum(array) for name, array in arrays.items()}}
    return dict(arrays) | {STAMP_NAME: np.frombuffer(json.dumps(sealed, sort_keys=True).encode(), dtype=np.uint8)}


def read_stamp(path: str, suffix: str = "") -> Stamp | None:
    """Return the stamp of an entry; see `read_stamps`."""
    return read_stamps(path, (suffix,))[0]


def read_stamps(path: str, suffixes: Sequence[str]) -> list[Stamp | None]:
    """Return the stamps of a file's entries, with None for those that have none or whose arrays were replaced since.

    Only the archive's directory and the stamps are read: the directory has the checksum of every array.

    Args:
        path: an npz file.
        suffixes: what follows the array names of each entry.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            checksums = {info.filename.removesuffix(".npy"): info.CRC for info in archive.infolist()}
            return [_read_stamp(archive, checksums, suffix) for suffix in suffixes]
    except DAMAGE as error:
        raise UserError(f"{path} is damaged ({error}). Delete it, and it will be made again.") from None


def _read_stamp(archive: zipfile.ZipFile, checksums: Mapping[str, int], suffix: str) -> Stamp | None:
    if STAMP_NAME + suffix not in checksums:
        return None
    packed = parse_array(archive.read(f"{STAMP_NAME}{suffix}.npy"))
    stamp: Stamp = json.loads(packed.tobytes())
    sealed = {name + suffix: checksum for name, checksum in stamp["checksums"].items()}
    return stamp if sealed.items() <= checksums.items() else None


def _checksum(array: np.ndarray[Any, Any]) -> int:
    """Return the CRC-32 of an array's npy form, which is what a zip directory notes."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return zlib.crc32(buffer.getbuffer())


def source_stamp(path: str) -> Stamp:
    """Describe a source file: bytes, time of the last change in nanoseconds, content."""
    status = os.stat(path)
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256_file(path)}


def is_same_source(stamp: Any, path: str, notes: FileNotes) -> bool:
    """Say whether a source file is the one in the stamp; its content is only hashed when its time differs, and that once.

    Args:
        stamp: what `source_stamp` gave.
        path: of the file, the same from wherever it is seen.
        notes: receives the hash.
    """
    if not isinstance(stamp, dict):
        return False
    status = os.stat(path)
    if stamp.get("bytes") != status.st_size:
        return False
    if stamp.get("mtime_ns") == status.st_mtime_ns or stamp.get("sha256") in notes.texts(path, status):
        return True
    found = sha256_file(path)
    notes.add(path, status, found)
    return bool(stamp.get("sha256") == found)


Progress = Callable[[int, int], None]
"""Called with the number of entries done and their total."""


def counted(made: Iterator[_Made], total: int, progress: Progress | None) -> Iterator[_Made]:
    """Pass on entries that are made, and tell their number."""
    if progress and total:
        progress(0, total)
    for done, entry in enumerate(made, start=1):
        yield entry
        if progress:
            progress(done, total)


@dataclass
class CacheReport:
    """What caching did, in this process."""

    kind: str
    """What was cached, for the sentence: "Latents", "Captions"."""
    kept: int = 0
    foreign: int = 0
    """Of those kept, files of another program, which do not say what they were made from."""
    made: Counter[str] = field(default_factory=Counter)
    """Entries made, by reason."""

    @classmethod
    def sum(cls, reports: Sequence["CacheReport"]) -> "CacheReport":
        """Add up what several processes did."""
        made: Counter[str] = sum((report.made for report in reports), Counter())
        return cls(reports[0].kind, sum(report.kept for report in reports), sum(report.foreign for report in reports), made)

    def sentence(self) -> str:
        """Return the account in one line."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.made.most_common())
        made = f"{self.made.total()} encoded ({reasons})" if self.made else "nothing to encode"
        kept = f"{self.kept} taken from the cache" if self.kept else "none in the cache"
        return f"{self.kind}: {kept}, {made}."

    def survey_sentence(self) -> str:
        """Return the account of what is there, and of what is still to be made."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.made.most_common())
        made = f"{self.made.total()} are to be encoded ({reasons})" if self.made else "nothing is to be encoded"
        foreign = f" ({self.foreign} of them from another program)" if self.foreign else ""
        return f"{self.kind}: {self.kept} are cached and right{foreign}, {made}."

    def foreign_sentence(self) -> str:
        """Return a word on files of other programs that were kept."""
        return (
            f"{self.foreign} latent caches are from another program and do not say which VAE made them. "
            "They fit the images and are used; delete them to have them made again."
        )
