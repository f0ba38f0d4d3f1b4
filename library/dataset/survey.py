"""What becomes of every image: how far it is enlarged, how much is cut off, how long its caption is. One pass over all items."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from library.dataset.columns import Flags, Ints
from library.dataset.dataset import Dataset
from library.dataset.token_counts import TokenCounter, longest_captions

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Survey:
    """One value for each item of a dataset, by its number."""

    enlargement: Floats
    """Length of a side after resizing over its length before, the larger of both sides."""
    cut_off: Floats
    """Share of the resized picture that lies outside of its bucket."""
    tokens: Ints
    """Of the longest caption it can have."""
    is_empty: Flags
    """Whether its own caption is empty."""
    shares_stem: Flags
    """Whether an earlier image of the folder has its name with another ending."""
    section: Ints
    subset: Ints


def survey(dataset: Dataset, counter: TokenCounter) -> Survey:
    """Look at every item once; no file is opened."""
    parts = [section.items for section in dataset.sections]
    sizes, resized, buckets = (
        np.concatenate([np.zeros((0, 2), dtype=np.int64), *columns])
        for columns in ([part.sizes for part in parts], [part.resized for part in parts], [part.buckets for part in parts])
    )
    empty = np.fromiter((not own.strip() for part in parts for own in part.captions()), dtype=np.bool_)
    tokens = counter.count(caption for section in dataset.sections for caption in longest_captions(section))
    return Survey(
        enlargement=(resized / sizes).max(axis=1, initial=0),
        cut_off=1 - buckets.prod(axis=1) / resized.prod(axis=1),
        tokens=np.fromiter(tokens, dtype=np.int32, count=len(empty)),
        is_empty=empty,
        shares_stem=np.concatenate([np.zeros(0, dtype=np.bool_), *(part.shares_stem for part in parts)]),
        section=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts]),
        subset=np.concatenate([np.zeros(0, dtype=np.int32), *(part.subsets for part in parts)]),
    )
