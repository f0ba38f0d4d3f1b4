"""Dataset definitions read with options as a person would give them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from library.options.dataset_config import DatasetConfig, load_dataset_config
from library.options.errors import UsageError
from library.options.groups.cache import CacheOptions
from library.options.groups.caption import CaptionOptions
from library.options.groups.dataset import DatasetOptions
from library.options.groups.image import ImageOptions
from library.options.groups.validation import ValidationOptions

KINDS = ("folder", "metadata", "control")

#  key                       sample        default    taken in: general, dataset, subset, of folder/metadata/control datasets
TABLE: tuple[tuple[str, Any, Any, str, str, str], ...] = (
    ("resolution", [512, 768], None, "GD", "GD", "GD"),
    ("batch_size", 3, 1, "GD", "GD", "GD"),
    ("enable_bucket", True, False, "GD", "GD", "GD"),
    ("min_bucket_reso", 128, 256, "GD", "GD", "GD"),
    ("max_bucket_reso", 2048, 1024, "GD", "GD", "GD"),
    ("bucket_reso_steps", 32, 64, "GD", "GD", "GD"),
    ("bucket_no_upscale", True, False, "GD", "GD", "GD"),
    ("network_multiplier", 2, 1.0, "GD", "GD", "GD"),
    ("validation_split", 0.5, 0.0, "GDS", "GDS", "GDS"),
    ("validation_seed", 7, None, "GDS", "GDS", "GDS"),
    ("resize_interpolation", "box", None, "GDS", "GDS", "GDS"),
    ("num_repeats", 4, 1, "GDS", "GDS", "GDS"),
    ("shuffle_caption", True, False, "GDS", "GDS", "GDS"),
    ("caption_separator", ";", ",", "GDS", "GDS", "GDS"),
    ("keep_tokens", 2, 0, "GDS", "GDS", "GDS"),
    ("keep_tokens_separator", "|||", "", "GDS", "GDS", "GDS"),
    ("secondary_separator", ";;", None, "GDS", "GDS", "GDS"),
    ("enable_wildcard", True, False, "GDS", "GDS", "GDS"),
    ("caption_prefix", "p", None, "GDS", "GDS", "GDS"),
    ("caption_suffix", "s", None, "GDS", "GDS", "GDS"),
    ("color_aug", True, False, "GDS", "GDS", "GDS"),
    ("flip_aug", True, False, "GDS", "GDS", "GDS"),
    ("random_crop", True, False, "GDS", "GDS", "GDS"),
    ("face_crop_aug_range", [1, 2.5], None, "GDS", "GDS", "GDS"),
    ("token_warmup_min", 2, 1, "GDS", "GDS", "GDS"),
    ("token_warmup_step", 0.25, 0, "GDS", "GDS", "GDS"),
    ("custom_attributes", {"a": {"b": [1]}}, {}, "GDS", "GDS", "GDS"),
    ("caption_dropout_rate", 1, 0.0, "GDS", "GDS", "GDS"),
    ("caption_dropout_every_n_epochs", 2, 0, "GDS", "GDS", "GDS"),
    ("caption_tag_dropout_rate", 0.5, 0.0, "GDS", "GDS", "GDS"),
    # a small letter: it may stand there for the sake of other datasets, and says nothing about this one
    ("class_tokens", "dog", None, "GDS", "g", "g"),
    ("caption_extension", ".txt", ".caption", "GDS", "g", "GDS"),
    ("cache_info", True, False, "GDS", "g", "GDS"),
    ("is_reg", True, False, "S", "", ""),
    ("alpha_mask", True, False, "GDS", "GDS", "g"),
    ("image_dir", "images", None, "S", "S", "S"),
    ("metadata_file", "meta.json", None, "", "S", ""),
    ("conditioning_data_dir", "masks", None, "", "", "S"),
)
READ = {"resolution": (512, 768), "face_crop_aug_range": (1.0, 2.5)}
SOURCES: Mapping[str, Mapping[str, str]] = {
    "folder": {"image_dir": "images"},
    "metadata": {"metadata_file": "meta.json", "image_dir": "images"},
    "control": {"image_dir": "images", "conditioning_data_dir": "masks"},
}


def load(path: Path | None, cache: dict[str, Any] | None = None, *, masked_loss: bool = False, **options: Any) -> DatasetConfig:
    """Read a dataset file, or the folders among the options, with the rest of the options as fallbacks."""

    def group(kind: type, **more: Any) -> Any:
        return kind(**{name: value for name, value in options.items() if name in kind.model_fields}, **more)

    return load_dataset_config(
        group(DatasetOptions, dataset_config=path),
        group(CaptionOptions),
        group(ImageOptions),
        CacheOptions(**(cache or {})),
        validation=group(ValidationOptions),
        masked_loss=masked_loss,
    )


def problems(path: Path | None, **options: Any) -> list[str]:
    """Return what is wrong, which must be something; without the numbers of lines."""
    return [re.sub(r"^(\S+), line \d+:", r"\1:", problem) for problem in problems_with_lines(path, **options)]


def problems_with_lines(path: Path | None, **options: Any) -> list[str]:
    """Return what is wrong, which must be something."""
    with pytest.raises(UsageError) as caught:
        load(path, **options)
    return list(caught.value.problems)


def effective(config: DatasetConfig, name: str) -> Any:
    """Return what a key came to for the first subset of a dataset."""
    section = config.sections[0]
    for record in (section.subsets[0], section.subsets[0].captions, section):
        if hasattr(record, name):
            return getattr(record, name)
    raise AssertionError(name)
