"""What becomes of every image: how far it is enlarged, how much is cut off, how long its caption is. One pass over all items."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from library.dataset.dataset import Dataset
from library.dataset.token_counts import TokenCounter, longest_caption

Floats = np.ndarray[Any, np.dtype[np.float32]]
Ints = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Survey:
    """One value for each item of a dataset, by its number."""

    enlargement: Floats
    """Length of a side after resizing over its length before, the larger of both sides."""
    cut_off: Floats
    """Share of the resized picture that lies outside of its bucket."""
    tokens: Ints
    """Of the longest caption it can have."""
    is_empty: np.ndarray[Any, np.dtype[np.bool_]]
    """Whether its own caption is empty."""
    shares_stem: np.ndarray[Any, np.dtype[np.bool_]]
    """Whether an earlier image of the folder has its name with another ending."""
    section: Ints
    subset: Ints


def survey(dataset: Dataset, counter: TokenCounter) -> Survey:
    """Look at every item once; no file is opened."""
    total = len(dataset.items)
    surveyed = Survey(
        enlargement=np.zeros(total, np.float32),
        cut_off=np.zeros(total, np.float32),
        tokens=np.zeros(total, np.int32),
        is_empty=np.zeros(total, np.bool_),
        shares_stem=np.zeros(total, np.bool_),
        section=np.zeros(total, np.int32),
        subset=np.zeros(total, np.int32),
    )
    rules = [[subset.captions for subset in section.config.subsets] for section in dataset.sections]
    for number, item in enumerate(dataset.items):
        (width, height), (resized_width, resized_height), bucket = item.size, item.geometry.resized, item.geometry.bucket
        surveyed.enlargement[number] = max(resized_width / width, resized_height / height)
        surveyed.cut_off[number] = 1 - bucket[0] * bucket[1] / (resized_width * resized_height)
        surveyed.tokens[number] = counter.tokens(longest_caption(item.caption, rules[item.section][item.subset]))
        surveyed.is_empty[number] = not item.caption.strip()
        surveyed.shares_stem[number] = os.path.basename(item.cache_stem) == os.path.basename(item.path)
        surveyed.section[number] = item.section
        surveyed.subset[number] = item.subset
    return surveyed
