"""The images of a run as records that are built when they are asked for, from columns."""

import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, overload

import numpy as np

from library.dataset.buckets import BucketChooser, Geometry, Size
from library.dataset.columns import Flags, Ints, Pictures
from library.dataset.images import Trait
from library.options.dataset_config import SectionConfig

_ALPHA = int(Trait.ALPHA)  # a plain number: flags take microseconds


@dataclass(frozen=True, slots=True)
class Item:
    """One image of one dataset, checked."""

    number: int
    """Position among all items of the run: those trained on, then those held out."""
    section: int
    subset: int
    """Position of its subset in its section."""
    path: str
    """The file as it was given; also its key in messages."""
    size: Size
    """Width and height, upright."""
    orientation: int
    """EXIF orientation, 1 to 8."""
    caption: str
    """The image's own text; lines are separated by newlines where wildcards are enabled."""
    tags: str
    """What counts as tags in statistics: the caption, or the tags of a metadata file."""
    repeats: int
    """Uses in an epoch."""
    is_reg: bool
    geometry: Geometry
    cache_stem: str
    """Path under which its caches lie, the same from whatever folder it is seen: without extension, but with it where two images
    differ in the extension alone."""
    has_alpha: bool = False
    """Whether parts of it may be transparent."""
    conditioning_path: str | None = None
    """The control or mask image that belongs to it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which images of a dataset are used, and how often: one entry of each column belongs to one item."""

    subsets: Ints
    rows: Ints
    """Position among the pictures of the subset."""
    repeats: Ints

    @classmethod
    def all_of(cls, subset: int, rows: "np.ndarray[Any, np.dtype[Any]]", repeats: int) -> "Choice":
        """Take rows of one subset, each as often."""
        return cls(np.full(len(rows), subset, np.int32), rows.astype(np.int32), np.full(len(rows), repeats, np.int32))

    @classmethod
    def joined(cls, parts: Sequence["Choice"]) -> "Choice":
        """Put choices one behind the other."""
        columns = [(part.subsets, part.rows, part.repeats) for part in parts]
        empty = np.zeros(0, dtype=np.int32)
        return (
            cls(*(np.concatenate([empty, *column]) for column in zip(*columns, strict=True))) if parts else cls(empty, empty, empty)
        )

    def where(self, wanted: "Flags | Sequence[int] | Ints") -> "Choice":
        """Return the entries that are wanted: flags for all of them, or their positions."""
        index = np.asarray(wanted) if len(wanted) else np.zeros(0, dtype=np.int64)
        return Choice(self.subsets[index], self.rows[index], self.repeats[index])


class _OnDemand(Sequence[Item], ABC):
    """Items by position, slice or from the end, given those by position alone."""

    @abstractmethod
    def _item(self, position: int) -> Item: ...

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self._item(position) for position in range(*index.indices(len(self)))]
        return self._item(range(len(self))[index])


class Items(_OnDemand):
    """The items of one dataset of the file.

    Args:
        config: of the dataset.
        section: the dataset's position in the file.
        first: number of the first item.
        pictures: of every subset.
        choice: which of them, in which order.
    """

    def __init__(self, config: SectionConfig, section: int, first: int, pictures: Sequence[Pictures], choice: Choice) -> None:
        self._config = config
        self._section = section
        self._first = first
        self._pictures = tuple(pictures)
        self._choice = choice
        self._chooser = BucketChooser(config)
        self._sizes = np.zeros((len(choice.rows), 2), dtype=np.int32)
        for subset, held in enumerate(self._pictures):
            own = choice.subsets == subset
            self._sizes[own] = held.sizes[choice.rows[own]]
        self.buckets: Ints = self._chooser.buckets(self._sizes)
        """(N, 2), width and height of the bucket of each item."""

    @property
    def repeats(self) -> Ints:
        """Uses of each item in an epoch."""
        return self._choice.repeats

    @property
    def subsets(self) -> Ints:
        """Position of the subset of each item."""
        return self._choice.subsets

    @property
    def sizes(self) -> Ints:
        """(N, 2), width and height of each item, upright."""
        return self._sizes

    @property
    def is_reg(self) -> Flags:
        """Whether each item is a regularisation image."""
        return np.array([subset.is_reg for subset in self._config.subsets], dtype=np.bool_)[self.subsets]

    @property
    def resized(self) -> Ints:
        """(N, 2), width and height of each item after resizing, before it is cropped."""
        return self._chooser.resized(self._sizes, self.buckets)

    @property
    def shares_stem(self) -> Flags:
        """Whether another image of the folder has the name of an item with another ending, and comes before it."""
        shared = np.zeros(len(self), dtype=np.bool_)
        for subset, held in enumerate(self._pictures):
            own = self.subsets == subset
            shared[own] = held.whole_names[self._choice.rows[own]]
        return shared

    def captions(self) -> Iterator[str]:
        """Yield the own text of each item."""
        return (text for subset, rows in self._runs() for text in self._pictures[subset].captions.many(rows))

    def tags(self) -> Iterator[tuple[int, Iterator[str]]]:
        """Yield what counts as tags of the items, in their order, with the subset of each stretch."""
        return ((subset, self._pictures[subset].tags.many(rows)) for subset, rows in self._runs())

    def paths(self) -> Iterator[str]:
        """Yield the file of each item."""
        return (path for subset, rows in self._runs() for path in self._pictures[subset].paths(rows))

    def cache_folders(self) -> set[str]:
        """Return the folders in which caches of pictures of this dataset lie."""
        return {folder.rstrip(os.sep) or os.sep for held in self._pictures for folder in held.real_folders}

    def _runs(self) -> Iterator[tuple[int, list[int]]]:
        """Yield stretches of items of one subset: the subset, and the rows among its pictures."""
        if len(self):
            edges = (np.flatnonzero(np.diff(self.subsets)) + 1).tolist()
            for start, end in pairwise([0, *edges, len(self)]):
                yield self.subsets.item(start), self._choice.rows[start:end].tolist()

    def __len__(self) -> int:
        return len(self._choice.rows)

    def __iter__(self) -> Iterator[Item]:
        return map(self._item, range(len(self)))

    def _item(self, position: int) -> Item:
        subset, row = self._choice.subsets.item(position), self._choice.rows.item(position)
        pictures = self._pictures[subset]
        size, bucket = _pair(self._sizes, position), _pair(self.buckets, position)
        caption = pictures.captions[row]
        return Item(
            number=self._first + position,
            section=self._section,
            subset=subset,
            path=pictures.path(row),
            size=size,
            orientation=pictures.orientations.item(row),
            caption=caption,
            tags=caption if pictures.tags is pictures.captions else pictures.tags[row],
            repeats=self._choice.repeats.item(position),
            is_reg=self._config.subsets[subset].is_reg,
            geometry=self._chooser.geometry(size, bucket),
            cache_stem=pictures.cache_stem(row),
            has_alpha=bool(pictures.traits.item(row) & _ALPHA),
            conditioning_path=(pictures.conditioning[row] or None) if pictures.conditioning is not None else None,
        )


class JoinedItems(_OnDemand):
    """The items of several datasets, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Item]]) -> None:
        self._parts = tuple(parts)
        self._starts = list(accumulate(map(len, self._parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def _item(self, position: int) -> Item:
        part = bisect_right(self._starts, position) - 1
        return self._parts[part][position - self._starts[part]]

    def __iter__(self) -> Iterator[Item]:
        return (item for part in self._parts for item in part)


def _pair(pairs: Ints, position: int) -> Size:
    return pairs.item(position, 0), pairs.item(position, 1)
