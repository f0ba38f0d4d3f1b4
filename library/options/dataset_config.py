"""Which images are trained on and how: a dataset file or a folder, with the command line as fallback, checked as a whole.

Nothing here opens an image or imports torch: every mistake in the file is known within the first second.
"""

import os
from collections.abc import Sequence
from typing import Any

from library.options.dataset_checks import (
    bucket_limits,
    control_problems,
    latent_cache_problems,
    mask_problems,
    section_problems,
    section_warnings,
)
from library.options.dataset_file import Place, read_dataset_file
from library.options.dataset_folders import SOURCE_OPTIONS, command_line_subsets
from library.options.dataset_keys import KEYS, DatasetKind, Key, subset_kind
from library.options.dataset_records import CaptionRules, DatasetConfig, SectionConfig, SubsetConfig
from library.options.dataset_values import NotThatType
from library.options.errors import UsageError
from library.options.groups.cache import LatentCacheOptions
from library.options.groups.caption import CaptionTextOptions
from library.options.groups.dataset import DatasetOptions
from library.options.groups.image import ImageOptions
from library.options.groups.validation import ValidationOptions

COMMAND_LINE = "the command line"

__all__ = ["CaptionRules", "DatasetConfig", "SectionConfig", "SubsetConfig", "bucket_limits", "load_dataset_config"]


def load_dataset_config(
    dataset: DatasetOptions,
    caption: CaptionTextOptions,
    image: ImageOptions,
    cache: LatentCacheOptions,
    *,
    validation: ValidationOptions | None = None,
    masked_loss: bool = False,
    follows_images: bool | None = False,
    size_multiple: int = 32,
) -> DatasetConfig:
    """Read `--dataset_config`, or the folders of `--train_data_dir` and `--reg_data_dir`, and check everything.

    Args:
        dataset: says which file or folders.
        caption: fallbacks of caption keys.
        image: fallbacks of size and augmentation keys.
        cache: what is cached, which some augmentation excludes.
        validation: fallbacks of the validation keys.
        masked_loss: whether the loss is weighted by masks, which conditioning images then are.
        follows_images: whether conditioning images are what a control network learns to follow; None where that is not known.
        size_multiple: sides of training images must be multiples of this many pixels.

    Raises:
        UsageError: with all mistakes at once.
    """
    reader = _Reader([dataset, caption, image] + ([] if validation is None else [validation]))
    places = reader.read_file(str(dataset.dataset_config)) if dataset.dataset_config else reader.read_folders(dataset)
    is_sound = not reader.problems
    sections = []
    for place, section in places:
        sections.append(section)
        reader.problems += section_problems(section, place.at(), size_multiple)
        reader.warnings += section_warnings(section, place.at())
        if cache.cache_latents:
            reader.problems += latent_cache_problems(section, place.at())
    if image.alpha_mask and any(subset.conditioning_data_dir for section in sections for subset in section.subsets):
        instead = "which are seen whole" if follows_images else "whose images are the masks"
        reader.warnings.append(f"--alpha_mask is not used for images with a conditioning_data_dir, {instead}.")
    if is_sound:
        source = str(dataset.dataset_config or COMMAND_LINE)
        if follows_images:
            reader.problems += control_problems(sections, source)
        elif follows_images is not None or masked_loss:
            reader.problems += mask_problems(sections, source, masked_loss)
    if reader.problems:
        raise UsageError(list(dict.fromkeys(reader.problems)))
    return DatasetConfig(
        sections=tuple(sections),
        prior_loss_weight=dataset.prior_loss_weight,
        from_file=bool(dataset.dataset_config),
        warnings=tuple(dict.fromkeys(reader.warnings)),
        true_crop_conditioning=image.true_crop_conditioning,
    )


class _Reader:
    """Turns tables into records and collects what is wrong."""

    def __init__(self, option_groups: Sequence[Any]) -> None:
        self.options = option_groups
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def read_file(self, path: str) -> list[tuple[Place, SectionConfig]]:
        given = [f"--{name}" for name in SOURCE_OPTIONS if self.option(name)]
        if given:
            self.warnings.append(f"{', '.join(given)} is ignored because --dataset_config names the images.")
        file = read_dataset_file(path)
        self.problems += file.problems
        read = [(tables.own, self.section([tables.own, file.general], tables.subsets)) for tables in file.datasets]
        return [(place, section) for place, section in read if section is not None]

    def read_folders(self, dataset: DatasetOptions) -> list[tuple[Place, SectionConfig]]:
        found = command_line_subsets(dataset)
        self.problems += found.problems
        self.warnings += found.warnings
        place = Place(COMMAND_LINE, "", {})
        section = self.section([place], found.subsets) if found.subsets else None
        return [] if section is None else [(place, section)]

    def section(self, outer: list[Place], subsets: list[Place]) -> SectionConfig | None:
        """Read a dataset whose subsets fall back on the tables in `outer`, of which the first is its own."""
        problems_before = len(self.problems)
        place = outer[0].at()
        own_keys = [name for name in SectionConfig.__dataclass_fields__ if name != "subsets"]
        values = {name: self.value(KEYS[name], outer) for name in own_keys}
        built = [self.subset([own, *outer]) for own in subsets]
        is_sound = len(self.problems) == problems_before
        if values["resolution"] is None and all(table.table.get("resolution") is None for table in outer):
            advice = "Set it there or with --resolution" if outer[0].where else "Give --resolution"
            self.problems.append(f"{place}: resolution is missing. {advice}, for example 1024.")
        kept = self.usable(place, [subset for subset in built if subset is not None])
        if built and not kept and is_sound:
            self.problems.append(f"{place}: no images are left to train on. Set num_repeats to at least 1.")
        return None if values["resolution"] is None else SectionConfig(**values, subsets=tuple(kept))

    def usable(self, place: str, subsets: list[SubsetConfig]) -> list[SubsetConfig]:
        """Leave out subsets that are not used or name the images of another one, by whatever path."""
        kept: dict[tuple[str, ...], SubsetConfig] = {}
        for subset in subsets:
            identity = _real_paths(subset.metadata_file, subset.image_dir)
            other = kept.setdefault(identity, subset) if subset.num_repeats >= 1 else None
            if other is None:
                self.warnings.append(f"{place}: {subset.source} is skipped: its number of repeats is {subset.num_repeats}.")
            elif _real_paths(other.conditioning_data_dir) != _real_paths(subset.conditioning_data_dir):
                self.problems.append(
                    f"{place}: {subset.source} is listed with two folders of conditioning images, {other.conditioning_data_dir} "
                    f"and {subset.conditioning_data_dir}. Put the second into another [[datasets]]."
                )
            elif other is not subset:
                self.warnings.append(f"{place}: {subset.source} is listed twice in one dataset; the second time is skipped.")
        return list(kept.values())

    def subset(self, places: list[Place]) -> SubsetConfig | None:
        kind = subset_kind(places[0].table)
        own_keys = [name for name in SubsetConfig.__dataclass_fields__ if name != "captions"]
        values = {name: self.value(KEYS[name], places, kind) for name in own_keys}
        rules = {name: self.value(KEYS[name], places, kind) for name in CaptionRules.__dataclass_fields__ if name in KEYS}
        own = places[0]
        if values["image_dir"] is None and kind is not DatasetKind.METADATA:
            if own.table.get("image_dir") is None:
                self.problems.append(f"{own.at()}: image_dir is missing. Name the folder of the images.")
            return None
        for name in ("image_dir", "conditioning_data_dir"):
            if values[name] is not None and not os.path.isdir(values[name]):
                self.problems.append(f"{own.at(name)}: {name} {values[name]} is not a folder. Paths start at {os.getcwd()}.")
        file = values["metadata_file"]
        if file is not None and not os.path.isfile(file):
            self.problems.append(f"{own.at('metadata_file')}: there is no metadata_file {file}. Paths start at {os.getcwd()}.")
        return SubsetConfig(**values | {"image_dir": values["image_dir"] or ""}, captions=CaptionRules(**rules))

    def value(self, key: Key, places: list[Place], kind: DatasetKind | None = None) -> Any:
        """Return the first value that is set, from the innermost table out to the command line.

        A key that does not go with the kind of subset has its default: it stands outside for the sake of other subsets.
        """
        if kind is not None and kind not in key.kinds:
            return key.default
        written = next((place.table[key.name] for place in places if place.table.get(key.name) is not None), None)
        if written is not None:
            try:
                return key.type.read(written)
            except NotThatType:  # already complained about with the file's keys
                return key.default
        given = None if key.option is None else self.option(key.option)
        try:
            return key.default if given is None else key.type.read(given)
        except NotThatType as error:
            self.problems.append(f"--{key.option} must be {error}, but it is {given!r}.")
            return key.default

    def option(self, name: str) -> Any:
        return next((getattr(group, name) for group in self.options if hasattr(group, name)), None)


def _real_paths(*paths: str | None) -> tuple[str, ...]:
    """Return what is the same for two spellings of the same paths."""
    return tuple(os.path.normcase(os.path.realpath(path)) if path else "" for path in paths)
