"""Many texts, or many pictures, in a few pieces of memory.

A Python text costs some fifty bytes before its first letter, and a worker process that merely looks at one copies its page. Packed
columns cost eight bytes a text, and looking changes nothing.
"""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int32]]
"""A column of whole numbers."""
Flags = np.ndarray[Any, np.dtype[np.bool_]]
"""A column of yes and no."""


class Texts(Sequence[str]):
    """Texts, packed; each is unpacked when it is asked for."""

    __slots__ = ("_ends", "_packed")

    def __init__(self, texts: Iterable[str]) -> None:
        parts = texts if isinstance(texts, list) else list(texts)
        whole = "".join(parts)
        lengths = map(len, parts if whole.isascii() else (text.encode("utf-8", "surrogatepass") for text in parts))
        self._packed = whole.encode("utf-8", "surrogatepass")  # names that are not UTF-8 come as surrogates
        self._ends = array("q", [0])  # an array gives single numbers faster than numpy
        self._ends.frombytes(np.cumsum(np.fromiter(lengths, dtype=np.int64, count=len(parts))).tobytes())

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index if index >= 0 else index + len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"there is no text {index} among {len(self)}")
        return self._packed[self._ends[position] : self._ends[position + 1]].decode("utf-8", "surrogatepass")

    def many(self, positions: Iterable[int]) -> Iterator[str]:
        """Yield the texts at some positions, none of them negative, faster than one by one."""
        packed, ends = self._packed, self._ends
        return (packed[ends[position] : ends[position + 1]].decode("utf-8", "surrogatepass") for position in positions)


@dataclass(frozen=True)
class Pictures:
    """The images of one subset, in order: one entry of each column belongs to one image."""

    folders: tuple[str, ...]
    """What stands before the names, separator included, and may be empty."""
    real_folders: tuple[str, ...]
    """The same folders, the same from wherever they are seen, without separator."""
    folder: Ints
    names: Texts
    whole_names: Flags
    """Whether the cache's name keeps the ending: another image of the folder has the name without it."""
    sizes: Ints
    """(N, 2), width and height, upright."""
    orientations: np.ndarray[Any, np.dtype[np.uint8]]
    traits: np.ndarray[Any, np.dtype[np.uint8]]
    """What `library.dataset.images.Trait` numbers."""
    captions: Texts
    tags: Texts
    """What counts as tags in statistics; the captions themselves where they do."""
    conditioning: Texts | None = None
    """Paths of control or mask images."""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> str:
        """Return the file of an image as it was given."""
        return self.folders[self.folder.item(row)] + self.names[row]

    def paths(self, rows: Sequence[int]) -> Iterator[str]:
        """Yield the files of some images; see `path`."""
        if len(self.folders) == 1:
            return map(self.folders[0].__add__, self.names.many(rows))
        return (self.folders[folder] + name for folder, name in zip(self.folder[rows].tolist(), self.names.many(rows), strict=True))

    def cache_stem(self, row: int) -> str:
        """Return the path under which the caches of an image lie; see `Item`."""
        name = self.names[row]
        if not self.whole_names.item(row):
            name = os.path.splitext(name)[0]
        return os.path.join(self.real_folders[self.folder.item(row)], name)
