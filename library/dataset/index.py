"""Find and check every image of a dataset, before anything expensive is done.

All bad files, and all that is only odd, go to the findings that every check feeds.
"""

import itertools
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from library.dataset.buckets import BucketChooser, Geometry, Size
from library.dataset.caption_files import find_caption_file, read_caption
from library.dataset.findings import Findings, Kind, names_of
from library.dataset.formats import IMAGE_EXTENSIONS, list_images, without_package
from library.dataset.images import ImageFacts, Trait, inspect_image
from library.dataset.metadata_file import caption_of, find_images, read_metadata
from library.dataset.split import held_out
from library.options.dataset_config import DatasetConfig, SectionConfig, SubsetConfig
from library.options.errors import UserError

logger = logging.getLogger(__name__)

_CHECKING_THREADS = min(16, 2 * (os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class Item:
    """One image of one dataset, checked."""

    number: int
    """Position among all items of the run: those trained on, then those held out."""
    section: int
    subset: int
    """Position of its subset in its section."""
    path: str
    """The file as it was given; also its key in messages."""
    size: Size
    """Width and height, upright."""
    orientation: int
    """EXIF orientation, 1 to 8."""
    caption: str
    """The image's own text; lines are separated by newlines where wildcards are enabled."""
    tags: str
    """What counts as tags in statistics: the caption, or the tags of a metadata file."""
    repeats: int
    """Uses in an epoch."""
    is_reg: bool
    geometry: Geometry
    cache_stem: str
    """Path under which its caches lie, the same from whatever folder it is seen: without extension, but with it where two images
    differ in the extension alone."""
    has_alpha: bool = False
    """Whether parts of it may be transparent."""
    conditioning_path: str | None = None
    """The control or mask image that belongs to it."""


@dataclass(frozen=True)
class Section:
    """The images of one dataset of the file."""

    config: SectionConfig
    items: tuple[Item, ...]
    """Training images in the order of their subsets, then regularisation images; images that are never used are not in it."""
    held_out: tuple[Item, ...]
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
class _Found:
    """An image file before its size is known."""

    section: int
    subset: int
    path: str
    caption: str
    tags: str
    cache_stem: str


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
    found = [image for number, section in enumerate(config.sections) for image in _section_images(number, section, collected)]
    facts = _inspect_all({image.path for image in found}, collected)
    geometries = _geometries(config, found, facts, collected)
    _report_traits(facts, collected)
    usable = [image for image in found if (image.section, image.path) in geometries]
    trained, without = _split(config, usable, seed, collected)
    sections: list[Section] = []
    for number, section in enumerate(config.sections):
        first = sum(len(built.items) for built in sections)
        own, own_without = ([image for image in part if image.section == number] for part in (trained, without))
        sections.append(_section(number, section, first, own, own_without, facts, geometries, collected))
    _report_emptiness(config, found, sections, collected)
    if findings is None:
        collected.raise_errors()
        if text := collected.warning_text():
            logger.warning("%s", text)
    return _held_out_numbered(sections)


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


def _section_images(number: int, section: SectionConfig, findings: Findings) -> Iterator[_Found]:
    for position, subset in enumerate(section.subsets):
        read = _metadata_captions if subset.metadata_file else _folder_captions
        captions = read(subset, findings)
        for (path, (caption, tags)), stem in zip(captions.items(), _cache_stems(captions), strict=True):
            yield _Found(number, position, path, caption, tags, stem)


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


def _geometries(
    config: DatasetConfig, found: Sequence[_Found], facts: dict[str, ImageFacts], findings: Findings
) -> dict[tuple[int, str], Geometry]:
    choosers = [BucketChooser(section) for section in config.sections]
    geometries = {}
    for image in found:
        if image.path not in facts:
            continue
        try:
            geometries[image.section, image.path] = choosers[image.section].choose(facts[image.path].size)
        except ValueError as error:
            findings.error(Kind.TOO_SMALL, image.path, f"{image.path}: {error}.")
    return geometries


def _split(config: DatasetConfig, found: Sequence[_Found], seed: int, findings: Findings) -> tuple[list[_Found], list[_Found]]:
    """Part what is trained on from what is held out; what one subset holds out is dropped from all others.

    Returns:
        Images trained on, images held out.
    """
    by_subset: dict[tuple[int, int], list[str]] = defaultdict(list)
    for image in found:
        by_subset[image.section, image.subset].append(image.path)
    chosen: dict[tuple[int, int], frozenset[str]] = {}
    for (number, position), paths in by_subset.items():
        subset = config.sections[number].subsets[position]
        if subset.validation_split > 0 and not subset.is_reg:
            own_seed = seed if subset.validation_seed is None else subset.validation_seed
            chosen[number, position] = held_out(paths, subset.validation_split, own_seed)
    if not chosen:
        return list(found), []
    without = [image for image in found if image.path in chosen.get((image.section, image.subset), ())]
    stems = {image.cache_stem for image in without}
    trained = [image for image in found if image.cache_stem not in stems]
    held = {(image.section, image.subset, image.path) for image in without}
    for image in found:
        if image.cache_stem in stems and (image.section, image.subset, image.path) not in held:
            source = config.sections[image.section].subsets[image.subset].source
            findings.warning(Kind.HELD_OUT, image.path, f"{image.path} is not trained on as an image of {source} either.")
    return trained, without


def _section(
    number: int,
    config: SectionConfig,
    first: int,
    trained: Sequence[_Found],
    without: Sequence[_Found],
    facts: dict[str, ImageFacts],
    geometries: dict[tuple[int, str], Geometry],
    findings: Findings,
) -> Section:
    def item(image: _Found) -> Item:
        subset, fact = config.subsets[image.subset], facts[image.path]
        return Item(
            number=0, section=number, subset=image.subset, path=image.path, size=fact.size, orientation=fact.orientation,
            caption=image.caption, tags=image.tags, repeats=subset.num_repeats, is_reg=subset.is_reg,
            geometry=geometries[number, image.path], cache_stem=image.cache_stem, has_alpha=Trait.ALPHA in fact.traits,
        )  # fmt: skip

    items = [item(image) for image in trained]
    train = [entry for entry in items if not entry.is_reg]
    reg = _balanced(train, [entry for entry in items if entry.is_reg], findings)
    counts = Counter(entry.subset for entry in items)
    numbered = tuple(replace(entry, number=first + position) for position, entry in enumerate(train + reg))
    held = tuple(replace(item(image), repeats=1) for image in without)
    return Section(config, numbered, held, tuple(counts[position] for position in range(len(config.subsets))))


def _held_out_numbered(sections: Sequence[Section]) -> tuple[Section, ...]:
    numbers = itertools.count(sum(len(section.items) for section in sections))
    return tuple(
        replace(section, held_out=tuple(replace(item, number=next(numbers)) for item in section.held_out)) for section in sections
    )


def _balanced(train: Sequence[Item], reg: Sequence[Item], findings: Findings) -> list[Item]:
    num_train = sum(item.repeats for item in train)
    uses = balance_regularisation(num_train, [item.repeats for item in reg])
    kept = [replace(item, repeats=count) for item, count in zip(reg, uses, strict=True) if count]
    unused = [item.path for item, count in zip(reg, uses, strict=True) if not count]
    if unused:
        told = (
            f"{len(unused)} of {len(reg)} regularisation images are not used, because there are only {num_train} uses of training "
            f"images: {_some(unused)}."
        )
        findings.warning(Kind.UNUSED_REG, os.path.dirname(unused[0]), told, count=len(unused), files=unused)
    return kept


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


def _report_emptiness(config: DatasetConfig, found: Sequence[_Found], sections: Sequence[Section], findings: Findings) -> None:
    folders = ", ".join(subset.source for section in config.sections for subset in section.subsets)
    if not found and not findings.has_errors:
        findings.error(Kind.NO_IMAGES, folders, f"There are no images in {folders}. {_what_counts().capitalize()}")
    elif found and not any(section.items for section in sections) and not findings.has_errors:
        told = "There are only regularisation images (is_reg). Add a subset of images to train on."
        findings.error(Kind.NO_IMAGES, folders, told)


def _what_counts() -> str:
    return f"files directly in the folder count: {' '.join(IMAGE_EXTENSIONS)}."


def _some(paths: Sequence[str]) -> str:
    return names_of([os.path.basename(path) for path in paths])
