"""What the images of a run are, small enough to be stored with a state and compared when it is resumed."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from library.dataset.dataset import Dataset
from library.dataset.index import Section
from library.options.dataset_config import SubsetConfig

_PLACES = frozenset({"image_dir", "metadata_file", "conditioning_data_dir", "captions"})
_COMPARED_BY_RESULT = frozenset({"cache_info", "class_tokens", "caption_extension", "validation_split", "validation_seed"})
"""Keys that are compared by the images and captions they lead to."""
_FILE_NAMES, _CAPTIONS, _GEOMETRY = "file names", "captions", "sizes, buckets and uses of the images"
DIGESTS = frozenset({_FILE_NAMES, _CAPTIONS, _GEOMETRY})
"""What is described by digests, which tell a person nothing but that they differ."""


def dataset_identity(dataset: Dataset, num_processes: int) -> dict[str, dict[str, Any]]:
    """Describe what an epoch is made of, by dataset and subset, in values that JSON can hold.

    Places of folders and the pictures' own content are not in it: a folder may move, and caches notice pictures that changed.

    Args:
        dataset: of the run.
        num_processes: that share each batch.
    """
    whole: dict[str, Any] = {
        "prior_loss_weight": dataset.config.prior_loss_weight,
        "true_crop_conditioning": dataset.config.true_crop_conditioning,
    }
    if not dataset.num_images:  # the batches of a class of the person's own
        whole["number of batches"] = dataset.num_uses
    found = {"all datasets": whole}
    for number, section in enumerate(dataset.sections, start=1):
        settings = {name: value for name, value in vars(section.config).items() if name not in ("subsets", "batch_size")}
        settings["images per batch, over all processes"] = section.config.batch_size * num_processes
        found[f"dataset {number}"] = _plain(settings)
        for position, subset in enumerate(section.config.subsets, start=1):
            name = f"subset {position} ({os.path.basename(os.path.normpath(subset.source))}) of dataset {number}"
            found[name] = _plain(_settings(subset)) | _images(section, position - 1)
    return found


def _settings(subset: SubsetConfig) -> dict[str, Any]:
    own = {name: value for name, value in vars(subset).items() if name not in _PLACES | _COMPARED_BY_RESULT}
    return own | {"conditioning images": subset.conditioning_data_dir is not None} | asdict(subset.captions)


def _images(section: Section, position: int) -> dict[str, Any]:
    """Describe the images of a subset that are trained on: how many, and digests of what the plan of an epoch depends on."""
    items = section.items
    own = np.asarray(items.subsets) == position
    folder = section.config.subsets[position].image_dir
    columns = np.column_stack([items.sizes[own], items.buckets[own], items.repeats[own]])
    return {
        "number of images": int(own.sum()),
        _FILE_NAMES: _digest(_short(path, folder) for path in _of(items.paths(), own)),
        _CAPTIONS: _digest(_of(items.captions(), own)),
        _GEOMETRY: hashlib.blake2b(columns.astype("<i4").tobytes(), digest_size=16).hexdigest(),
    }


def _of(column: Iterable[str], own: "np.ndarray[Any, np.dtype[np.bool_]]") -> Iterator[str]:
    return (text for text, is_own in zip(column, own.tolist(), strict=True) if is_own)


def _short(path: str, folder: str) -> str:
    return path.removeprefix(folder).lstrip("/\\") if folder else os.path.basename(path)


def _digest(texts: Iterable[str]) -> str:
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as JSON gives them back; a TOML file may hold others, such as dates."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain
