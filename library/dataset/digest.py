"""What tells two datasets apart, in a few characters."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice

from library.dataset.dataset import Dataset
from library.dataset.items import Items

_GROUP = 4096
"""Texts hashed at a time."""
_FOLDERS = ("image_dir", "metadata_file", "conditioning_data_dir")
"""What of a subset names a place on this machine; only the last part of it counts."""


def dataset_digests(dataset: Dataset) -> dict[str, str]:
    """Return a digest of each side of a dataset that training depends on, so that a difference can be named.

    `images`: names, sizes, repeats and kinds of the pictures, in their order; `held_out`: those of the pictures held out;
    `captions`: the texts as they are in the files; `settings`: the dataset file and what stands in for it, without folders. A
    dataset that was moved to another folder has the same digests. Contents of picture files are not read.
    """
    return {
        "images": _digest(chain.from_iterable(_pictures(section.items) for section in dataset.sections)),
        "held_out": _digest(chain.from_iterable(_pictures(section.held_out) for section in dataset.sections)),
        "captions": _digest(chain.from_iterable(section.items.captions() for section in dataset.sections)),
        "settings": _digest(_settings(dataset)),
    }


def digest_of(digests: Mapping[str, str]) -> str:
    """Return one digest of several named ones."""
    return _digest(f"{name} {digest}" for name, digest in sorted(digests.items()))


def _pictures(items: Items) -> Iterator[str]:
    columns = (items.repeats.tolist(), items.is_reg.tolist(), items.sizes.tolist())
    for path, repeats, is_reg, (width, height) in zip(items.paths(), *columns, strict=True):
        yield f"{os.path.basename(path)} {width}x{height} {repeats} {is_reg}"


def _settings(dataset: Dataset) -> Iterator[str]:
    yield str(dataset.config.prior_loss_weight)
    yield str(dataset.config.true_crop_conditioning)
    for section in dataset.config.sections:
        yield repr(replace(section, subsets=()))
        for subset in section.subsets:
            named = {name: os.path.basename(os.path.normpath(path)) for name in _FOLDERS if (path := getattr(subset, name))}
            yield repr(replace(subset, cache_info=False, **named))


def _digest(texts: Iterable[str]) -> str:
    """Hash texts, each by itself: where one ends and the next begins counts."""
    hashed = hashlib.blake2b(digest_size=16)
    rest = iter(texts)
    while group := list(islice(rest, _GROUP)):
        hashed.update("".join(f"{len(text)}:{text}" for text in group).encode("utf-8", "surrogatepass"))
    return hashed.hexdigest()
