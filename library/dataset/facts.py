"""What is recorded of a dataset in the metadata of the files that are trained with it."""

import os
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np

from library.dataset.buckets import Size
from library.dataset.dataset import Dataset
from library.dataset.index import Section
from library.options.dataset_config import SubsetConfig

Facts = dict[str, Any]
"""Values that `json.dumps` can write."""
TagCounts = dict[str, dict[str, int]]
"""Uses of each tag by folder or metadata file."""

_GROUP = 4096


def metadata_facts(dataset: Dataset, num_processes: int = 1) -> Facts:
    """Return the `ss_` entries that describe the dataset; lists and dicts are to be written as JSON, the rest as text.

    With a dataset file there is one description per dataset, else flat entries, as sd-scripts writes them.
    """
    counted = [tag_frequency(section) for section in dataset.sections]
    facts: Facts = {
        "ss_tag_frequency": {folder: tags for counts in counted for folder, tags in counts.items()},
        "ss_dataset_dirs": folders(dataset, is_reg=False),
    }
    if dataset.config.from_file:
        return facts | {"ss_datasets": [section_facts(*pair) for pair in zip(dataset.sections, counted, strict=True)]}
    return facts | _flat_facts(dataset, num_processes)


def section_facts(section: Section, counted: TagCounts | None = None) -> Facts:
    """Describe one dataset of the file.

    Args:
        section: the dataset.
        counted: its `tag_frequency`, where that is known already.
    """
    config = section.config
    return {
        "is_dreambooth": all(subset.metadata_file is None for subset in config.subsets),
        "batch_size_per_device": config.batch_size,
        "num_train_images": section.num_train_uses,
        "num_reg_images": section.num_reg_images,
        "resolution": list(config.resolution),
        "enable_bucket": config.enable_bucket,
        "min_bucket_reso": config.min_bucket_reso,
        "max_bucket_reso": config.max_bucket_reso,
        "tag_frequency": tag_frequency(section) if counted is None else counted,
        "bucket_info": bucket_info(section),
        "resize_interpolation": config.resize_interpolation,
        "subsets": [_subset_facts(subset, count) for subset, count in zip(config.subsets, section.image_counts, strict=True)],
    }


def tag_frequency(section: Section) -> TagCounts:
    """Count the tags by folder or metadata file: split at commas, stripped, in lower case, none empty."""
    counts: dict[str, Counter[str]] = {}
    for subset, texts in section.items.tags():
        counted = counts.setdefault(_folder_name(section.config.subsets[subset]), Counter())
        while group := list(islice(texts, _GROUP)):
            # as they stand first, since most come again and again
            for written, uses in Counter(",".join(group).replace("\n", ",").split(",")).items():
                if tag := written.strip().lower():
                    counted[tag] += uses
    return {folder: dict(tags) for folder, tags in counts.items()}


def bucket_info(section: Section) -> Facts | None:
    """Return sizes and uses of the buckets and by how much the aspect of the pictures is off; None without buckets."""
    if not section.config.enable_bucket:
        return None
    sizes, buckets_of = section.items.sizes, section.items.buckets
    uses: Counter[Size] = Counter()
    for (width, height), repeats in zip(buckets_of.tolist(), section.items.repeats.tolist(), strict=True):
        uses[width, height] += repeats
    buckets = {number: {"resolution": list(size), "count": uses[size]} for number, size in enumerate(sorted(uses))}
    errors: list[float] = np.abs(buckets_of[:, 0] / buckets_of[:, 1] - sizes[:, 0] / sizes[:, 1]).tolist()
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors) if errors else 0.0}


def folders(dataset: Dataset, *, is_reg: bool) -> dict[str, Facts]:
    """Return repeats and image counts by folder name; folders of one name are told apart by a number."""
    found: dict[str, Facts] = {}
    for section in dataset.sections:
        for subset, count in zip(section.config.subsets, section.image_counts, strict=True):
            if subset.is_reg == is_reg:
                found[_unused_name(_folder_name(subset), found)] = {"n_repeats": subset.num_repeats, "img_count": count}
    return found


def _unused_name(name: str, taken: dict[str, Facts]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name} ({number})", number + 1
    return candidate


def _flat_facts(dataset: Dataset, num_processes: int) -> Facts:
    (section,) = dataset.sections
    config = section.config
    subset = config.subsets[0]
    return {
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": config.batch_size * num_processes,
        "ss_resolution": f"({config.resolution[0]}, {config.resolution[1]})",
        "ss_color_aug": subset.color_aug,
        "ss_flip_aug": subset.flip_aug,
        "ss_random_crop": subset.random_crop,
        "ss_shuffle_caption": subset.captions.shuffle_caption,
        "ss_enable_bucket": config.enable_bucket,
        "ss_bucket_no_upscale": config.bucket_no_upscale,
        "ss_min_bucket_reso": config.min_bucket_reso,
        "ss_max_bucket_reso": config.max_bucket_reso,
        "ss_keep_tokens": subset.captions.keep_tokens,
        "ss_reg_dataset_dirs": folders(dataset, is_reg=True),
        "ss_bucket_info": bucket_info(section),
    }


def _subset_facts(subset: SubsetConfig, count: int) -> Facts:
    rules = subset.captions
    return {
        "img_count": count,
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": rules.shuffle_caption,
        "keep_tokens": rules.keep_tokens,
        "keep_tokens_separator": rules.keep_tokens_separator,
        "secondary_separator": rules.secondary_separator,
        "enable_wildcard": rules.enable_wildcard,
        "caption_prefix": rules.caption_prefix,
        "caption_suffix": rules.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
        "image_dir": os.path.basename(os.path.normpath(subset.image_dir)) if subset.image_dir else None,
        **(
            {"metadata_file": os.path.basename(subset.metadata_file)}
            if subset.metadata_file
            else {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
        ),
    }


def _folder_name(subset: SubsetConfig) -> str:
    return os.path.basename(os.path.normpath(subset.source))
