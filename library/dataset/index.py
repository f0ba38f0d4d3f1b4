"""Find and check every image of a dataset, before anything expensive is done.

All bad files, and all that is only odd, go to the findings that every check feeds.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from library.dataset.buckets import BucketChooser
from library.dataset.collector import without_collector
from library.dataset.columns import Flags, Pictures
from library.dataset.control_images import with_controls
from library.dataset.findings import Findings, Kind, names_of
from library.dataset.folder_files import FolderFiles
from library.dataset.items import Choice, Item, Items
from library.dataset.listing import Lister
from library.dataset.picture_reports import report_of_subset
from library.dataset.split import held_out
from library.options.dataset_config import DatasetConfig, SectionConfig, SubsetConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Section:
    """The images of one dataset of the file."""

    config: SectionConfig
    items: Items
    """Training images in the order of their subsets, then regularisation images; images that are never used are not in it."""
    held_out: Items
    """Images that are never trained on, to measure the loss on; each is used once. Their numbers follow those of all training
    items of the run."""
    image_counts: tuple[int, ...]
    """Images found in the folder of each subset, but for those held out."""

    @property
    def num_train_uses(self) -> int:
        """The number of training images, repeats included."""
        return int(self.items.repeats[~self.items.is_reg].sum(dtype=np.int64))

    @property
    def num_reg_images(self) -> int:
        """The number of regularisation images found, repeats included, whether all are used or not."""
        pairs = zip(self.config.subsets, self.image_counts, strict=True)
        return sum(subset.num_repeats * count for subset, count in pairs if subset.is_reg)

    def subset(self, item: Item) -> SubsetConfig:
        """Return the settings an item falls under."""
        return self.config.subsets[item.subset]

    def interpolation(self, item: Item) -> str | None:
        """Return the resampling method of an item."""
        return self.subset(item).resize_interpolation or self.config.resize_interpolation


def build_index(
    config: DatasetConfig,
    findings: Findings | None = None,
    *,
    seed: int = 0,
    open_folder: Callable[[str], FolderFiles] = FolderFiles,
) -> tuple[Section, ...]:
    """List, read captions of, and check all images, and hold some out where a subset asks for it.

    Args:
        config: says which images.
        findings: receives every image that is missing, damaged or too small, every caption file that cannot be read, and what is
            odd; such images are left out. Without it, errors are raised and warnings logged here.
        seed: of the run; it chooses the images that are held out where no `validation_seed` does.
        open_folder: looks at a folder.

    Raises:
        UserError: there are errors and no `findings` to take them.
    """
    collected = Findings() if findings is None else findings
    lister = Lister(collected, open_folder)
    with without_collector():
        pictures = [[lister.pictures(subset) for subset in section.subsets] for section in config.sections]
    for number, position, subset in _subsets(config):
        held = pictures[number][position]
        report_of_subset(subset, held, collected)
        if folder := subset.conditioning_data_dir:
            bucketed = config.sections[number].enable_bucket
            pictures[number][position] = with_controls(held, folder, lister.sizes(folder), collected, bucketed=bucketed)
    lister.finish()
    usable = [_with_bucket(section, held, collected) for section, held in zip(config.sections, pictures, strict=True)]
    without = _split(config, pictures, usable, seed, collected)
    choices = [_choose(*parts, collected) for parts in zip(config.sections, pictures, usable, without, strict=True)]
    _report_empty_sources(lister, collected)
    if lister.has_images:
        _report_nothing_trained(config, pictures, choices, collected)
    if findings is None:
        collected.raise_errors()
        if text := collected.warning_text():
            logger.warning("%s", text)
    return _numbered(config, pictures, choices)


def balance_regularisation(num_train: int, reg_repeats: Sequence[int]) -> list[int]:
    """Return how often each regularisation image is used so that together they reach the number of training uses.

    Args:
        num_train: uses of training images in an epoch.
        reg_repeats: the repeats each regularisation image asks for, in order.

    Returns:
        Uses of each; images beyond the number that suffices are not used.
    """
    uses = [0] * len(reg_repeats)
    total = 0
    for position, repeats in enumerate(reg_repeats):
        if total >= num_train:
            break
        uses[position] = repeats
        total += repeats
    position = 0
    while reg_repeats and total < num_train:
        uses[position % len(uses)] += 1
        total += 1
        position += 1
    return uses


def _with_bucket(config: SectionConfig, pictures: Sequence[Pictures], findings: Findings) -> list[Flags]:
    """Say of each image whether it has a bucket."""
    chooser = BucketChooser(config)
    usable = []
    for held in pictures:
        fits = chooser.buckets(held.sizes)[:, 0] > 0
        for row in np.flatnonzero(~fits).tolist():
            try:
                chooser.bucket((int(held.sizes[row, 0]), int(held.sizes[row, 1])))
            except ValueError as error:
                findings.error(Kind.TOO_SMALL, held.path(row), f"{held.path(row)}: {error}.")
        usable.append(fits)
    return usable


def _split(
    config: DatasetConfig,
    pictures: Sequence[Sequence[Pictures]],
    usable: Sequence[Sequence[Flags]],
    seed: int,
    findings: Findings,
) -> list[list[Flags]]:
    """Say of each image whether it is held out; what one subset holds out is dropped from all others.

    Args:
        config: says how many.
        pictures: by dataset and subset.
        usable: of each, whether it can be trained on; those dropped are taken from it.
        seed: of the run.
        findings: receives the images that are dropped.
    """
    without = [[np.zeros(len(held), dtype=np.bool_) for held in own] for own in pictures]
    stems: set[str] = set()
    for number, position, subset in _subsets(config):
        if subset.validation_split > 0 and not subset.is_reg:
            held, rows = pictures[number][position], np.flatnonzero(usable[number][position]).tolist()
            own_seed = seed if subset.validation_seed is None else subset.validation_seed
            row_of = {held.path(row): row for row in rows}
            chosen = [row_of[path] for path in held_out(list(row_of), subset.validation_split, own_seed)]
            without[number][position][chosen] = True
            stems.update(held.cache_stem(row) for row in chosen)
    for number, position, subset in _subsets(config) if stems else ():
        held, own = pictures[number][position], without[number][position]
        for row in np.flatnonzero(usable[number][position] & ~own).tolist():
            if held.cache_stem(row) in stems:
                usable[number][position][row] = False
                path = held.path(row)
                findings.warning(Kind.HELD_OUT, path, f"{path} is not trained on as an image of {subset.source} either.")
    return without


def _subsets(config: DatasetConfig) -> Iterator[tuple[int, int, SubsetConfig]]:
    for number, section in enumerate(config.sections):
        for position, subset in enumerate(section.subsets):
            yield number, position, subset


@dataclass(frozen=True)
class _Choices:
    trained: Choice
    held_out: Choice
    counts: tuple[int, ...]


def _choose(
    config: SectionConfig, pictures: Sequence[Pictures], usable: Sequence[Flags], without: Sequence[Flags], findings: Findings
) -> _Choices:
    """Choose the items of a dataset: all training images, then as many regularisation images as balance them."""
    order = sorted(range(len(config.subsets)), key=lambda subset: config.subsets[subset].is_reg)
    trained = [
        Choice.all_of(subset, np.flatnonzero(usable[subset] & ~without[subset]), config.subsets[subset].num_repeats)
        for subset in order
    ]
    held = [Choice.all_of(subset, np.flatnonzero(without[subset]), 1) for subset in range(len(config.subsets))]
    is_reg = [config.subsets[subset].is_reg for subset in order]
    train = Choice.joined([part for part, reg in zip(trained, is_reg, strict=True) if not reg])
    reg = Choice.joined([part for part, reg in zip(trained, is_reg, strict=True) if reg])
    counts = {subset: len(part.rows) for subset, part in zip(order, trained, strict=True)}
    return _Choices(
        Choice.joined([train, _balanced(train, reg, pictures, findings)]),
        Choice.joined(held),
        tuple(counts[subset] for subset in range(len(config.subsets))),
    )


def _numbered(config: DatasetConfig, pictures: Sequence[Sequence[Pictures]], choices: Sequence[_Choices]) -> tuple[Section, ...]:
    """Number all training items of the run, and behind them all that are held out."""
    first, first_held = 0, sum(len(choice.trained.rows) for choice in choices)
    sections = []
    for number, (section, held, choice) in enumerate(zip(config.sections, pictures, choices, strict=True)):
        items = Items(section, number, first, held, choice.trained)
        without = Items(section, number, first_held, held, choice.held_out)
        sections.append(Section(section, items, without, choice.counts))
        first, first_held = first + len(items), first_held + len(without)
    return tuple(sections)


def _balanced(train: Choice, reg: Choice, pictures: Sequence[Pictures], findings: Findings) -> Choice:
    num_train = int(train.repeats.sum())
    uses = np.array(balance_regularisation(num_train, reg.repeats.tolist()), dtype=np.int32)
    unused = [pictures[reg.subsets[entry]].path(reg.rows[entry]) for entry in np.flatnonzero(uses == 0).tolist()]
    if unused:
        told = (
            f"{len(unused)} of {len(uses)} regularisation images are not used, because there are only {num_train} uses of training "
            f"images: {names_of([os.path.basename(path) for path in unused])}."
        )
        findings.warning(Kind.UNUSED_REG, os.path.dirname(unused[0]), told, count=len(unused), files=unused)
    return replace(reg, repeats=uses).where(uses > 0)


def _report_empty_sources(lister: Lister, findings: Findings) -> None:
    """Tell of folders and metadata files without images: an error if that is all there is."""
    is_reason = not lister.has_images and not findings.has_errors
    for source, told in lister.empty.items():
        if is_reason:
            findings.error(Kind.NO_IMAGES, source, told)
        else:
            findings.warning(Kind.CONFIG, source, told)


def _report_nothing_trained(
    config: DatasetConfig, pictures: Sequence[Sequence[Pictures]], choices: Sequence[_Choices], findings: Findings
) -> None:
    """Tell why none of the images is trained on, if so."""
    if findings.has_errors or any(len(choice.trained.rows) for choice in choices):
        return
    if all(subset.is_reg or not len(pictures[number][position]) for number, position, subset in _subsets(config)):
        told = "There are only regularisation images (is_reg). Add a subset of images to train on."
    else:
        told = (
            "All images to train on are held out (validation_split), by their own subset or by another that has the same images. "
            "Lower validation_split, or add images."
        )
    findings.error(Kind.NO_IMAGES, _sources(config), told)


def _sources(config: DatasetConfig) -> str:
    return ", ".join(subset.source for _, _, subset in _subsets(config))
