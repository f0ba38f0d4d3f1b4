"""The keys of a dataset file: what each takes, where it may stand, its command-line twin and its default.

Reader, JSON schema and messages all follow from this table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from library.options.dataset_values import (
    BOOL,
    EXTENSION,
    FACTOR_RANGE,
    FRACTION,
    INTERPOLATION,
    RESOLUTION,
    SEPARATOR,
    SHARE,
    TABLE,
    TEXT,
    ValueType,
    number,
    whole_number,
)

GENERAL, DATASET, SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"

_ALL = (GENERAL, DATASET, SUBSET)
_ABOVE_SUBSET = (GENERAL, DATASET)
_SUBSET = (SUBSET,)

PRESERVE = "diff_output_preservation"
"""The custom attribute of images whose target is what the model predicts without the network."""


class DatasetKind(StrEnum):
    """Where the captions and the masks of a dataset come from; the value says what its subsets have."""

    FOLDER = "an image_dir alone"
    METADATA = "a metadata_file"
    CONTROL = "a conditioning_data_dir"


_EVERY_KIND = frozenset(DatasetKind)
_FOLDER_ONLY = frozenset({DatasetKind.FOLDER})
_CAPTION_FILES = frozenset({DatasetKind.FOLDER, DatasetKind.CONTROL})
_OWN_ALPHA = frozenset({DatasetKind.FOLDER, DatasetKind.METADATA})


@dataclass(frozen=True)
class Key:
    """One key of the dataset file."""

    name: str
    type: ValueType
    levels: tuple[str, ...]
    summary: str
    default: Any = None
    option: str | None = None
    """The command-line option that is the fallback, by attribute name."""
    kinds: frozenset[DatasetKind] = _EVERY_KIND
    """The datasets whose images it says something about; others refuse it, but in [general] it stands for all."""


_KEYS = (
    Key("resolution", RESOLUTION, _ABOVE_SUBSET, "Training size in pixels: a side, or [width, height].", option="resolution"),
    Key("batch_size", whole_number(1), _ABOVE_SUBSET, "Images per process and step.", 1, "train_batch_size"),
    Key("enable_bucket", BOOL, _ABOVE_SUBSET,
        "Train images in sizes of their own shape instead of cropping all to one.", False, "enable_bucket"),
    Key("min_bucket_reso", whole_number(1), _ABOVE_SUBSET, "Shortest side of a bucket in pixels.", 256, "min_bucket_reso"),
    Key("max_bucket_reso", whole_number(1), _ABOVE_SUBSET,
        "Longest side of a bucket in pixels; 2048 is usual for a resolution of 1024.", 1024, "max_bucket_reso"),
    Key("bucket_reso_steps", whole_number(1), _ABOVE_SUBSET,
        "Sides of buckets are multiples of this, which is itself a multiple of 32.", 64, "bucket_reso_steps"),
    Key("bucket_no_upscale", BOOL, _ABOVE_SUBSET,
        "Never enlarge an image: its bucket comes from its own size.", False, "bucket_no_upscale"),
    Key("network_multiplier", number(), _ABOVE_SUBSET, "Strength at which the trained network acts on these images.", 1.0),
    Key("resize_interpolation", INTERPOLATION, _ALL,
        "Resampling method; when left out, area for shrinking and Lanczos for enlarging.", option="resize_interpolation"),
    Key("validation_split", SHARE, _ALL, "Fraction of the images that is held out of training.", 0.0, "validation_split"),
    Key("validation_seed", whole_number(0), _ALL, "Seed of the choice of held-out images.", option="validation_seed"),
    Key("image_dir", TEXT, _SUBSET, "Folder with the images."),
    Key("metadata_file", TEXT, _SUBSET, "File (.json, .jsonl) that names images with their captions and tags.",
        kinds=frozenset({DatasetKind.METADATA})),
    Key("conditioning_data_dir", TEXT, _SUBSET,
        "Folder with a control or mask image of the same name for every image.", kinds=frozenset({DatasetKind.CONTROL})),
    Key("is_reg", BOOL, _SUBSET, "These are regularisation images.", False, kinds=_FOLDER_ONLY),
    Key("class_tokens", TEXT, _ALL, "Caption of images without a caption file.", kinds=_FOLDER_ONLY),
    Key("caption_extension", EXTENSION, _ALL,
        "Ending of caption files, such as .txt.", ".caption", "caption_extension", _CAPTION_FILES),
    Key("cache_info", BOOL, _ALL,
        "Remember size and caption of every image in metadata_cache.json in the folder.", False, "cache_info", _CAPTION_FILES),
    Key("num_repeats", whole_number(), _ALL,
        "Uses of each image per epoch; a subset with less than 1 is skipped.", 1, "dataset_repeats"),
    Key("flip_aug", BOOL, _ALL, "Mirror half of the uses of an image.", False, "flip_aug"),
    Key("color_aug", BOOL, _ALL, "Vary hue and gamma of some images a little.", False, "color_aug"),
    Key("random_crop", BOOL, _ALL, "Crop at random instead of at the centre.", False, "random_crop"),
    Key("face_crop_aug_range", FACTOR_RANGE, _ALL,
        "Crop around the face named in the file name, by a factor between these two.", option="face_crop_aug_range"),
    Key("alpha_mask", BOOL, _ALL, "Use the alpha channel of an image as a mask of its loss.", False, "alpha_mask", _OWN_ALPHA),
    Key("custom_attributes", TABLE, _ALL, "Free table that goes with every image; diff_output_preservation is known.", {}),
    Key("shuffle_caption", BOOL, _ALL, "Shuffle the tags of a caption at every use.", False, "shuffle_caption"),
    Key("caption_separator", SEPARATOR, _ALL, "Text that separates the tags of a caption.", ",", "caption_separator"),
    Key("keep_tokens", whole_number(0), _ALL, "Number of leading tags that are never moved or dropped.", 0, "keep_tokens"),
    Key("keep_tokens_separator", TEXT, _ALL,
        "Text in a caption before which, and after whose second occurrence, tags stay fixed.", "", "keep_tokens_separator"),
    Key("secondary_separator", TEXT, _ALL,
        "Text that joins several tags into one for shuffling and dropping.", option="secondary_separator"),
    Key("enable_wildcard", BOOL, _ALL,
        "Pick one line of a caption and one part of {a|b|c} at every use.", False, "enable_wildcard"),
    Key("caption_prefix", TEXT, _ALL, "Text put before every caption, with one blank between.", option="caption_prefix"),
    Key("caption_suffix", TEXT, _ALL, "Text put after every caption, with one blank between.", option="caption_suffix"),
    Key("caption_dropout_rate", FRACTION, _ALL,
        "Probability of training on an empty caption.", 0.0, "caption_dropout_rate"),
    Key("caption_dropout_every_n_epochs", whole_number(0), _ALL,
        "Train on empty captions in every n-th epoch; 0 never does.", 0, "caption_dropout_every_n_epochs"),
    Key("caption_tag_dropout_rate", FRACTION, _ALL,
        "Probability of dropping each tag that is not kept.", 0.0, "caption_tag_dropout_rate"),
    Key("token_warmup_min", whole_number(0), _ALL,
        "Number of tags, besides those that are kept, at the start of the tag warm-up.", 1, "token_warmup_min"),
    Key("token_warmup_step", number(0), _ALL,
        "Step from which all tags are used; below 1 a fraction of all steps.", 0.0, "token_warmup_step"),
)  # fmt: skip

KEYS: Mapping[str, Key] = {key.name: key for key in _KEYS}

RENAMED = {
    "train_batch_size": "batch_size",
    "dataset_repeats": "num_repeats",
    "caption_extention": "caption_extension",
    "train_data_dir": "image_dir",
    "reg_data_dir": "image_dir, with is_reg = true beside it,",
    "in_json": "metadata_file",
}
"""Command-line spellings that have another name in the file."""


def subset_kind(subset: Mapping[str, Any]) -> DatasetKind:
    """Return the kind a subset makes its dataset, by the keys that are written in it."""
    if subset.get("conditioning_data_dir") is not None:
        return DatasetKind.CONTROL
    return DatasetKind.FOLDER if subset.get("metadata_file") is None else DatasetKind.METADATA
