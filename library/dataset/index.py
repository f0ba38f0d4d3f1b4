"""Find and check every image of a dataset, before anything expensive is done.

All bad files, and all that is only odd, go to the findings that every check feeds.
"""

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from library.dataset.buckets import BucketChooser
from library.dataset.caption_files import find_caption_file, read_caption
from library.dataset.columns import Flags, Pictures, Texts
from library.dataset.findings import Findings, Kind, names_of
from library.dataset.formats import IMAGE_EXTENSIONS, list_images, without_package
from library.dataset.images import ImageFacts, Trait, inspect_image
from library.dataset.items import Choice, Item, Items
from library.dataset.metadata_file import caption_of, find_images, read_metadata
from library.dataset.split import held_out
from library.options.dataset_config import DatasetConfig, SectionConfig, SubsetConfig
from library.options.errors import UserError

logger = logging.getLogger(__name__)

_CHECKING_THREADS = min(16, 2 * (os.cpu_count() or 1))


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

    def subset(self, item: Item) -> SubsetConfig:
        """Return the settings an item falls under."""
        return self.config.subsets[item.subset]

    def interpolation(self, item: Item) -> str | None:
        """Return the resampling method of an item."""
        return self.subset(item).resize_interpolation or self.config.resize_interpolation


@dataclass(frozen=True)
class _Listing:
    """The images of one subset before their sizes are known."""

    paths: Sequence[str]
    texts: Sequence[tuple[str, str]]
    """Caption and tags of each."""
    stems: Sequence[str]


def build_index(config: DatasetConfig, findings: Findings | None = None, *, seed: int = 0) -> tuple[Section, ...]:
    """List, read captions of, and check all images, and hold some out where a subset asks for it.

    Args:
        config: says which images.
        findings: receives every image that is missing, damaged or too small, every caption file that cannot be read, and what is
            odd; such images are left out. Without it, errors are raised and warnings logged here.
        seed: of the run; it chooses the images that are held out where no `validation_seed` does.

    Raises:
        UserError: there are errors and no `findings` to take them.
    """
    collected = Findings() if findings is None else findings
    listings = [[_listing(subset, collected) for subset in section.subsets] for section in config.sections]
    paths = {path for own in listings for listing in own for path in listing.paths}
    facts = _inspect_all(paths, collected)
    _report_traits(facts, collected)
    pictures = [[_pictures(listing, facts) for listing in own] for own in listings]
    usable = [_with_bucket(section, held, collected) for section, held in zip(config.sections, pictures, strict=True)]
    without = _split(config, pictures, usable, seed, collected)
    choices = [_choose(*parts, collected) for parts in zip(config.sections, pictures, usable, without, strict=True)]
    _report_emptiness(config, bool(paths), any(len(choice.trained.rows) for choice in choices), collected)
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


def _listing(subset: SubsetConfig, findings: Findings) -> _Listing:
    captions = (_metadata_captions if subset.metadata_file else _folder_captions)(subset, findings)
    return _Listing(list(captions), list(captions.values()), list(_cache_stems(captions)))


def _folder_captions(subset: SubsetConfig, findings: Findings) -> dict[str, tuple[str, str]]:
    """Return caption and tags, which are the same text, of each image of a folder."""
    paths = list_images(subset.image_dir)
    if not paths:
        findings.warning(Kind.CONFIG, subset.image_dir, f"{subset.image_dir} has no images; {_what_counts()}")
    return {path: (caption, caption) for path, caption in zip(paths, _captions(paths, subset, findings), strict=True)}


def _metadata_captions(subset: SubsetConfig, findings: Findings) -> dict[str, tuple[str, str]]:
    """Return caption and tags of each image that a metadata file names."""
    rules = subset.captions
    try:
        entries = read_metadata(subset.source)
    except UserError as error:
        findings.error(Kind.METADATA, subset.source, str(error))
        return {}
    if not entries:
        findings.warning(Kind.CONFIG, subset.source, f"{subset.source} names no images.")
    found = find_images(entries, subset.image_dir, IMAGE_EXTENSIONS, findings)
    without = [path for path, entry in found.items() if not entry.caption and not entry.tags]
    if without:
        told = (
            f"{len(without)} of {len(found)} images in {subset.source} have neither caption nor tags and are trained with an empty "
            f"caption: {_some(without)}."
        )
        findings.warning(Kind.NO_CAPTION, subset.source, told, count=len(without), files=without)
    if subset.image_dir:
        left = sorted(set(list_images(subset.image_dir)) - set(found))
        if left:
            told = f"{len(left)} images of {subset.image_dir} have no entry in {subset.source} and are not used: {_some(left)}."
            findings.warning(Kind.UNUSED_IMAGES, subset.image_dir, told, count=len(left), files=left)
    return {
        path: (caption_of(entry, rules.caption_separator, multiline=rules.enable_wildcard), entry.tags)
        for path, entry in found.items()
    }


def _cache_stems(paths: Iterable[str]) -> Iterator[str]:
    """Give the first image of a name the name without extension, as sd-scripts does, and later ones their whole file name.

    The first is that of the folder, in the order of names, whether it is used or not: metadata files may share out a folder.
    """
    owners: dict[str, dict[str, str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        real = os.path.realpath(folder)
        if real not in owners:
            names = [os.path.basename(image) for image in list_images(real)]
            owners[real] = {os.path.splitext(name)[0]: name for name in reversed(names)}
        stem = os.path.splitext(name)[0]
        yield os.path.join(real, stem if owners[real].setdefault(stem, name) == name else name)


def _captions(paths: Sequence[str], subset: SubsetConfig, findings: Findings) -> list[str]:
    captions, without = [], []
    for path in paths:
        file = find_caption_file(path, subset.caption_extension)
        try:
            caption = None if file is None else read_caption(file, multiline=subset.captions.enable_wildcard)
        except UserError as error:
            findings.error(Kind.UNREADABLE_CAPTION, path, str(error))
            caption = ""
        if caption is None and subset.class_tokens is None:
            without.append(path)
        captions.append((subset.class_tokens or "") if caption is None else caption)
    if without:
        told = (
            f"{len(without)} of {len(paths)} images in {subset.image_dir} have no {subset.caption_extension} file and are trained "
            f"with an empty caption: {_some(without)}."
        )
        findings.warning(Kind.NO_CAPTION, subset.image_dir, told, count=len(without), files=without)
    return captions


def _inspect_all(paths: Collection[str], findings: Findings) -> dict[str, ImageFacts]:
    """Check all files in parallel: reading and checksums release the interpreter lock."""
    unknown = without_package(sorted(paths))
    for why, files in unknown.items():
        names = f"{_some(files)} {'is' if len(files) == 1 else 'are'}"
        findings.error(Kind.FORMAT, os.path.dirname(files[0]), f"{names} {why}.", count=len(files), files=files)
    ordered = sorted(set(paths).difference(*unknown.values()))
    facts: dict[str, ImageFacts] = {}
    with ThreadPoolExecutor(_CHECKING_THREADS) as pool:
        for path, outcome in zip(ordered, pool.map(_facts_or_problem, ordered), strict=True):
            if isinstance(outcome, ImageFacts):
                facts[path] = outcome
            else:
                findings.error(Kind.UNREADABLE_IMAGE, path, outcome)
    return facts


def _facts_or_problem(path: str) -> ImageFacts | str:
    try:
        return inspect_image(path)
    except UserError as error:
        return str(error)


def _pictures(listing: _Listing, facts: Mapping[str, ImageFacts]) -> Pictures:
    """Pack what is known of the images that can be read."""
    rows = [row for row, path in enumerate(listing.paths) if path in facts]
    paths, stems = [listing.paths[row] for row in rows], [listing.stems[row] for row in rows]
    names = [os.path.basename(path) for path in paths]
    places = [(path.removesuffix(name), os.path.dirname(stem)) for path, name, stem in zip(paths, names, stems, strict=True)]
    numbers = {place: number for number, place in enumerate(dict.fromkeys(places))}
    captions = Texts(listing.texts[row][0] for row in rows)
    own_tags = any(caption is not tags for caption, tags in listing.texts)
    return Pictures(
        folders=tuple(folder for folder, _ in numbers),
        real_folders=tuple(real for _, real in numbers),
        folder=np.array([numbers[place] for place in places], dtype=np.int32),
        names=Texts(names),
        whole_names=np.array([os.path.basename(stem) == name for stem, name in zip(stems, names, strict=True)], dtype=np.bool_),
        sizes=np.array([facts[path].size for path in paths], dtype=np.int32).reshape(-1, 2),
        orientations=np.array([facts[path].orientation for path in paths], dtype=np.uint8),
        traits=np.array([facts[path].traits for path in paths], dtype=np.uint8),
        captions=captions,
        tags=Texts(listing.texts[row][1] for row in rows) if own_tags else captions,
    )


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
            f"images: {_some(unused)}."
        )
        findings.warning(Kind.UNUSED_REG, os.path.dirname(unused[0]), told, count=len(unused), files=unused)
    return replace(reg, repeats=uses).where(uses > 0)


def _report_traits(facts: dict[str, ImageFacts], findings: Findings) -> None:
    """Tell how many images are not plain upright 8-bit pictures."""
    turned = [path for path, fact in facts.items() if fact.orientation != 1]
    animated = [path for path, fact in facts.items() if fact.traits & Trait.ANIMATED]
    deep = [path for path, fact in facts.items() if fact.traits & Trait.SIXTEEN_BIT]
    cmyk = [path for path, fact in facts.items() if fact.traits & Trait.CMYK]
    for kind, what, paths in (
        (Kind.TURNED, "images are turned", turned),
        (Kind.COLOUR, "images have 16 bits a channel", deep),
        (Kind.COLOUR, "images are CMYK", cmyk),
        (Kind.ANIMATED, "images are animated", animated),
    ):
        if paths:
            folder = os.path.dirname(paths[0])
            findings.warning(kind, folder, f"{len(paths)} {what}: {_some(paths)}.", count=len(paths), files=paths)


def _report_emptiness(config: DatasetConfig, has_images: bool, has_items: bool, findings: Findings) -> None:
    folders = ", ".join(subset.source for section in config.sections for subset in section.subsets)
    if not has_images and not findings.has_errors:
        findings.error(Kind.NO_IMAGES, folders, f"There are no images in {folders}. {_what_counts().capitalize()}")
    elif has_images and not has_items and not findings.has_errors:
        told = "There are only regularisation images (is_reg). Add a subset of images to train on."
        findings.error(Kind.NO_IMAGES, folders, told)


def _what_counts() -> str:
    return f"files directly in the folder count: {' '.join(IMAGE_EXTENSIONS)}."


def _some(paths: Sequence[str]) -> str:
    return names_of([os.path.basename(path) for path in paths])
