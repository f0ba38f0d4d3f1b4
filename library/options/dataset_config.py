"""Which images are trained on and how: a dataset file or a folder, with the command line as fallback, checked as a whole.

Nothing here opens an image or imports torch: every mistake in the file is known within the first second.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.options.dataset_file import Place, read_dataset_file
from library.options.dataset_keys import KEYS, Key, NotThatType
from library.options.errors import UsageError
from library.options.groups.cache import CacheFileOptions
from library.options.groups.caption import CaptionTextOptions
from library.options.groups.dataset import DatasetOptions
from library.options.groups.image import ImageOptions
from library.options.groups.validation import ValidationOptions


@dataclass(frozen=True)
class CaptionRules:
    """How the text of a caption file becomes the caption of one use of the image."""

    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    """Flexible tags that are used at the first update of the tag warm-up."""
    token_warmup_step: float = 0.0
    """Update from which all tags are used; below 1 a fraction of all updates; 0 is no warm-up."""

    @property
    def moves_tags(self) -> bool:
        """Whether captions are taken apart into tags and put together again."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0 or self.token_warmup_step > 0

    def varying(self) -> list[str]:
        """Return the names of the settings that give an image another caption from use to use."""
        names = (
            "shuffle_caption",
            "enable_wildcard",
            "caption_dropout_rate",
            "caption_dropout_every_n_epochs",
            "caption_tag_dropout_rate",
            "token_warmup_step",
        )
        return [name for name in names if getattr(self, name)]

    def varying_text(self) -> list[str]:
        """Return those of `varying` that change the text itself; the others decide whether there is any."""
        return [name for name in self.varying() if not name.startswith("caption_dropout_")]

    @property
    def drops_captions(self) -> bool:
        """Whether some uses of an image have no caption at all."""
        return self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0


@dataclass(frozen=True)
class SubsetConfig:
    """One folder of images with caption files, or the images that one metadata file names."""

    image_dir: str
    """Empty where a metadata file has whole paths."""
    metadata_file: str | None
    conditioning_data_dir: str | None
    """Folder with a control or mask image for every image."""
    num_repeats: int
    is_reg: bool
    class_tokens: str | None
    """The caption of images without a caption file; None warns about such images."""
    caption_extension: str
    cache_info: bool
    flip_aug: bool
    color_aug: bool
    random_crop: bool
    face_crop_aug_range: tuple[float, float] | None
    """Factors between which the crop around a face is larger than the face."""
    alpha_mask: bool
    resize_interpolation: str | None
    """None: area where both sides shrink, else Lanczos."""
    validation_split: float
    """Fraction of the images that is held out of training."""
    validation_seed: int | None
    custom_attributes: Mapping[str, Any]
    """Handed on with every image, for whoever knows them."""
    captions: CaptionRules

    @property
    def source(self) -> str:
        """The file or folder the images come from."""
        return self.metadata_file or self.image_dir


@dataclass(frozen=True)
class SectionConfig:
    """One dataset of the file: images that share resolution, batch size and buckets."""

    resolution: tuple[int, int]
    """Width and height in pixels."""
    batch_size: int
    """Images per process and step."""
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int
    bucket_reso_steps: int
    bucket_no_upscale: bool
    network_multiplier: float
    """Strength at which the trained network acts on these images."""
    resize_interpolation: str | None
    subsets: tuple[SubsetConfig, ...]


@dataclass(frozen=True)
class DatasetConfig:
    """All that is trained on."""

    sections: tuple[SectionConfig, ...]
    prior_loss_weight: float
    """Loss weight of regularisation images."""
    from_file: bool
    warnings: tuple[str, ...] = ()
    """What is odd but not wrong, for the log."""


def load_dataset_config(
    dataset: DatasetOptions,
    caption: CaptionTextOptions,
    image: ImageOptions,
    cache: CacheFileOptions,
    *,
    validation: ValidationOptions | None = None,
    size_multiple: int = 32,
) -> DatasetConfig:
    """Read `--dataset_config`, or the folders of `--train_data_dir` and `--reg_data_dir`, and check everything.

    Args:
        dataset: says which file or folders.
        caption: fallbacks of caption keys.
        image: fallbacks of size and augmentation keys.
        cache: what is cached.
        validation: fallbacks of the validation keys.
        size_multiple: sides of training images must be multiples of this many pixels.

    Raises:
        UsageError: with all mistakes at once.
    """
    reader = _Reader([dataset, caption, image] + ([] if validation is None else [validation]))
    if dataset.dataset_config:
        sections = reader.read_file(str(dataset.dataset_config))
    else:
        sections = reader.read_folders(dataset.train_data_dir, dataset.reg_data_dir, dataset.in_json)
    for number, section in enumerate(sections, start=1):
        where = f"{reader.source}: dataset {number}" if dataset.dataset_config else reader.source
        reader.problems += section_problems(section, where, size_multiple)
        reader.warnings += section_warnings(section, where)
    if reader.problems:
        raise UsageError(list(dict.fromkeys(reader.problems)))
    return DatasetConfig(
        sections=tuple(sections),
        prior_loss_weight=dataset.prior_loss_weight,
        from_file=bool(dataset.dataset_config),
        warnings=tuple(dict.fromkeys(reader.warnings)),
    )


class _Reader:
    """Turns tables into records and collects what is wrong."""

    def __init__(self, option_groups: Sequence[Any]) -> None:
        self.options = option_groups
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.source = "the command line"

    def read_file(self, path: str) -> list[SectionConfig]:
        self.source = path
        given = [f"--{name}" for name in ("train_data_dir", "reg_data_dir", "in_json") if self.option(name)]
        if given:
            self.warnings.append(f"{', '.join(given)} is ignored because --dataset_config names the images.")
        file = read_dataset_file(path)
        self.problems += file.problems
        sections = [self.section(dataset.own.where, [dataset.own, file.general], dataset.subsets) for dataset in file.datasets]
        return [section for section in sections if section is not None]

    def read_folders(self, train_data_dir: str | None, reg_data_dir: str | None, in_json: str | None) -> list[SectionConfig]:
        if not train_data_dir:
            self.problems.append(
                f"--in_json {in_json} needs --train_data_dir FOLDER, the folder of its images."
                if in_json
                else "No images: give --dataset_config FILE, or --train_data_dir FOLDER with folders such as '10_sks dog'."
            )
            return []
        if in_json:
            if reg_data_dir:
                self.warnings.append("--reg_data_dir is ignored because --in_json names the images.")
            place = Place("--in_json", {"metadata_file": in_json, "image_dir": train_data_dir})
            section = self.section("the command line", [], [place])
            return [] if section is None else [section]
        places = [
            Place("--train_data_dir", table) for table in self.subset_folders(train_data_dir, "--train_data_dir", is_reg=False)
        ]
        if reg_data_dir:
            places += [Place("--reg_data_dir", table) for table in self.subset_folders(reg_data_dir, "--reg_data_dir", is_reg=True)]
        section = self.section("the command line", [], places)
        return [] if section is None else [section]

    def subset_folders(self, parent: str, flag: str, *, is_reg: bool) -> Iterator[dict[str, Any]]:
        """Yield a subset for each folder whose name is a number of repeats, optionally followed by `_` and class tokens."""
        if not os.path.isdir(parent):
            self.problems.append(f"{flag} {parent}: there is no such folder. Paths start at {os.getcwd()}.")
            return
        found = False
        for name in sorted(entry.name for entry in os.scandir(parent) if entry.is_dir()):
            count, _, class_tokens = name.partition("_")
            path = os.path.join(parent, name)
            try:
                repeats = int(count)
            except ValueError:
                self.warnings.append(f"{path} is skipped: its name does not start with a number of repeats, as in 10_{name}.")
                continue
            found = True
            yield {"image_dir": path, "num_repeats": repeats, "class_tokens": class_tokens, "is_reg": is_reg}
        if not found:
            self.problems.append(
                f"{flag} {parent} has no folder named REPEATS_CLASS, such as '10_sks dog'. Put the images into one."
            )

    def section(self, where: str, outer: list[Place], subsets: list[Place]) -> SectionConfig | None:
        problems_before = len(self.problems)
        own_keys = [name for name in SectionConfig.__dataclass_fields__ if name != "subsets"]
        values = {name: self.value(KEYS[name], outer) for name in own_keys}
        self.problems += mixed_kinds(f"{self.source}: {where}", [place.table for place in subsets])
        built = [self.subset([place, *outer]) for place in subsets]
        is_sound = len(self.problems) == problems_before
        if values["resolution"] is None and all(place.table.get("resolution") is None for place in outer):
            self.problems.append(
                f"{self.source}: {where}: resolution is missing. Set it there or with --resolution, for example 1024."
            )
        kept = self.usable(where, [subset for subset in built if subset is not None])
        if built and not kept and is_sound:
            self.problems.append(f"{self.source}: {where}: no folder is left to train on. Set num_repeats to at least 1.")
        return None if values["resolution"] is None else SectionConfig(**values, subsets=tuple(kept))

    def usable(self, where: str, subsets: list[SubsetConfig]) -> list[SubsetConfig]:
        kept: dict[str, SubsetConfig] = {}
        for subset in subsets:
            identity = os.path.realpath(subset.source)
            if subset.num_repeats < 1:
                self.warnings.append(f"{where}: {subset.source} is skipped: its number of repeats is {subset.num_repeats}.")
            elif identity in kept:
                self.warnings.append(f"{where}: {subset.source} is listed twice in one dataset; the second time is skipped.")
            else:
                kept[identity] = subset
        return list(kept.values())

    def subset(self, places: list[Place]) -> SubsetConfig | None:
        own_keys = [name for name in SubsetConfig.__dataclass_fields__ if name != "captions"]
        values = {name: self.value(KEYS[name], places) for name in own_keys}
        rules = CaptionRules(**{name: self.value(KEYS[name], places) for name in CaptionRules.__dataclass_fields__})
        where, own = places[0].where, places[0].table
        if values["metadata_file"] is not None:
            return self.metadata_subset(where, own, values, rules)
        if values["image_dir"] is None:
            if "image_dir" not in own:
                self.problems.append(f"{self.source}: {where}: image_dir is missing. Name the folder of the images.")
            return None
        if not os.path.isdir(values["image_dir"]):
            self.problems.append(
                f"{self.source}: {where}: image_dir {values['image_dir']} is not a folder. Paths start at {os.getcwd()}."
            )
        return SubsetConfig(**values, captions=rules)

    def metadata_subset(self, where: str, own: Mapping[str, Any], values: dict[str, Any], rules: CaptionRules) -> SubsetConfig:
        """Check a subset whose images and captions a metadata file names."""
        foreign = [name for name in ("class_tokens", "caption_extension", "is_reg") if own.get(name) is not None]
        if foreign:
            self.problems.append(
                f"{self.source}: {where}: {', '.join(foreign)} is for folders with caption files; here captions are in the "
                "metadata_file. Remove it."
            )
        if not os.path.isfile(values["metadata_file"]):
            self.problems.append(
                f"{self.source}: {where}: there is no metadata_file {values['metadata_file']}. Paths start at {os.getcwd()}."
            )
        if values["image_dir"] is not None and not os.path.isdir(values["image_dir"]):
            self.problems.append(
                f"{self.source}: {where}: image_dir {values['image_dir']} is not a folder. Paths start at {os.getcwd()}."
            )
        return SubsetConfig(
            **values | {"image_dir": values["image_dir"] or "", "class_tokens": None, "is_reg": False}, captions=rules
        )

    def value(self, key: Key, places: list[Place]) -> Any:
        """Return the first value that is set, from the innermost table out to the command line."""
        written = next((place.table[key.name] for place in places if place.table.get(key.name) is not None), None)
        if written is not None:
            try:
                return key.read(written)
            except NotThatType:  # already complained about with the file's keys
                return key.default
        given = None if key.option is None else self.option(key.option)
        try:
            return key.default if given is None else key.read(given)
        except NotThatType as error:
            self.problems.append(f"--{key.option} must be {error}, but it is {given!r}.")
            return key.default

    def option(self, name: str) -> Any:
        return next((getattr(group, name) for group in self.options if hasattr(group, name)), None)


def mixed_kinds(where: str, subsets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Complain where some subsets of a dataset have a metadata file and others caption files."""
    with_file = sum(table.get("metadata_file") is not None for table in subsets)
    if with_file in (0, len(subsets)):
        return []
    return [
        f"{where}: {with_file} of {len(subsets)} subsets have a metadata_file. Subsets with and without one belong into different "
        "[[datasets]]."
    ]


def section_problems(section: SectionConfig, where: str, size_multiple: int) -> list[str]:
    """Return what makes the sizes of a dataset unusable."""
    width, height = section.resolution
    size, step = f"{width}x{height}", section.bucket_reso_steps
    if not section.enable_bucket:
        fits = width % size_multiple == 0 and height % size_multiple == 0
        advice = f"{where}: resolution {size} must consist of multiples of {size_multiple}. Change it or set enable_bucket."
        return [] if fits else [advice]
    problems = []
    if step % size_multiple:
        problems.append(f"{where}: bucket_reso_steps is {step}, but it must be a multiple of {size_multiple}.")
    lowest, highest = bucket_limits(section)
    if min(width, height) < lowest:
        problems.append(f"{where}: min_bucket_reso {lowest} is above the resolution {size}. Lower it.")
    if max(width, height) > highest:
        problems.append(
            f"{where}: max_bucket_reso {highest} is below the resolution {size}. Raise it, for example to {2 * max(width, height)}."
        )
    return problems


def bucket_limits(section: SectionConfig) -> tuple[int, int]:
    """Return the smallest and largest bucket side: rounded outwards to multiples of the step."""
    step = section.bucket_reso_steps
    return section.min_bucket_reso // step * step, -(-section.max_bucket_reso // step) * step


def section_warnings(section: SectionConfig, where: str) -> list[str]:
    """Return what in a dataset probably is not meant."""
    warnings = []
    lowest, highest = bucket_limits(section)
    if section.enable_bucket and section.bucket_no_upscale:
        warnings.append(f"{where}: min_bucket_reso and max_bucket_reso are not used with bucket_no_upscale.")
    elif section.enable_bucket:
        if (lowest, highest) != (section.min_bucket_reso, section.max_bucket_reso):
            warnings.append(
                f"{where}: bucket sides are taken from {lowest} to {highest}, multiples of {section.bucket_reso_steps}."
            )
        if highest == max(section.resolution):
            warnings.append(
                f"{where}: max_bucket_reso is {highest}, so images that are not square are trained at a smaller area "
                f"than the resolution. {2 * highest} is usual."
            )
    for subset in section.subsets:
        rules = subset.captions
        if rules.keep_tokens_separator and not rules.moves_tags:
            warnings.append(
                f"{where}: keep_tokens_separator {rules.keep_tokens_separator!r} stays in the captions of {subset.source}: "
                f"it has an effect with shuffle_caption, caption_tag_dropout_rate and token_warmup_step only."
            )
    return warnings
