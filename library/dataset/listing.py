"""The images of a subset with their captions, as columns: from a folder with caption files, or from a metadata file."""

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from library.dataset.buckets import Size
from library.dataset.caption_files import caption_candidates, caption_of_text, likely_extension
from library.dataset.columns import Flags, Pictures, Texts
from library.dataset.findings import Findings, Kind, names_of
from library.dataset.folder_files import FolderFiles
from library.dataset.formats import IMAGE_EXTENSIONS, without_package
from library.dataset.images import Trait
from library.dataset.index_store import unpacked_facts
from library.dataset.info_file import InfoFile
from library.dataset.metadata_file import Entry, Mistake, caption_of, find_images, read_metadata
from library.options.dataset_config import SubsetConfig
from library.options.errors import UserError

_WHAT_COUNTS = f"Files directly in the folder count: {' '.join(IMAGE_EXTENSIONS)}."


@dataclass(frozen=True)
class _Listed:
    """The images of a subset: an entry of each list belongs to one image."""

    folders: Sequence[FolderFiles]
    folder: Sequence[int]
    """Which of the folders each lies in."""
    names: Sequence[str]
    facts: Sequence[int | None]
    """What is known of each file, packed; None for images that cannot be used."""
    captions: Sequence[str]
    tags: Sequence[str]
    """The captions themselves where these are the tags."""


class Lister:
    """Lists subsets, each folder and each subset that several datasets share once.

    Args:
        findings: receives what is wrong or odd with the files.
        open_folder: looks at a folder.
    """

    def __init__(self, findings: Findings, open_folder: Callable[[str], FolderFiles]) -> None:
        self.has_images = False
        """Whether any were found, whatever they are worth."""
        self.empty: dict[str, str] = {}
        """What is said of folders and metadata files without images, by their path."""
        self._findings = findings
        self._open_folder = open_folder
        self._folders: dict[str, FolderFiles] = {}
        self._pictures: dict[tuple[object, ...], Pictures] = {}

    def pictures(self, subset: SubsetConfig) -> Pictures:
        """Return the images of a subset that can be read."""
        rules = subset.captions
        key = (
            subset.source, subset.image_dir, subset.caption_extension, subset.class_tokens, rules.enable_wildcard,
            rules.caption_separator, subset.cache_info,
        )  # fmt: skip
        if key not in self._pictures:
            listed = self._of_metadata(subset) if subset.metadata_file else self._of_folder(subset)
            self.has_images = self.has_images or bool(listed.names)
            self._pictures[key] = _packed(listed)
        return self._pictures[key]

    def sizes(self, path: str) -> dict[str, Size | None]:
        """Return the size of every image of a folder by its path, in the order of names; None for those that cannot be read."""
        folder = self._folder(path)
        facts, bad = self._facts(folder, folder.images)
        sizes, _, _ = unpacked_facts([known for known in facts if known is not None])
        readable = iter(sizes.tolist())
        found: dict[str, Size | None] = {}
        for name, known in zip(folder.images, facts, strict=True):
            if known is not None or name in bad:  # the others are folders
                found[folder.prefix + name] = None if known is None else tuple(next(readable))
        return found

    def finish(self) -> None:
        """Tell what is odd about the images as a whole, and let go of what only listing needs."""
        self._folders.clear()
        _report_traits(list(self._pictures.values()), self._findings)

    def _folder(self, path: str) -> FolderFiles:
        if path not in self._folders:
            self._folders[path] = self._open_folder(path)
        return self._folders[path]

    def _of_folder(self, subset: SubsetConfig) -> _Listed:
        folder = self._folder(subset.image_dir)
        info = InfoFile(subset.image_dir) if subset.cache_info else None
        facts, bad = self._facts(folder, folder.images, info)
        names = folder.images
        if None in facts:  # damaged images, whose captions are looked at nevertheless, and folders that are named like images
            kept = [(name, known) for name, known in zip(names, facts, strict=True) if known is not None or name in bad]
            names, facts = [name for name, _ in kept], [known for _, known in kept]
        if not names:
            self.empty[subset.source] = f"There are no images in {subset.image_dir}. {_WHAT_COUNTS}"
        files = _caption_files(folder, names, subset.caption_extension)
        captions = self._captions(folder, names, files, subset, info)
        if info is not None:
            info.write(list(zip(names, files, captions, strict=True)))
        return _Listed([folder], [0] * len(names), names, facts, captions, captions)

    def _captions(
        self, folder: FolderFiles, images: Sequence[str], files: Sequence[str], subset: SubsetConfig, info: InfoFile | None
    ) -> list[str]:
        problems: dict[str, str] = {}
        texts = folder.caption_texts(list(filter(None, files)), problems, None if info is None else info.captions)
        for name, told in problems.items():
            self._findings.error(Kind.UNREADABLE_CAPTION, folder.prefix + name, told)
        if len(texts) < len(files):
            read = iter(texts)
            own = {} if info is None or subset.class_tokens is not None else info.own_texts
            texts = [next(read) if file else own.get(name) for name, file in zip(images, files, strict=True)]
            without = [name for name, file in zip(images, files, strict=True) if not file and name not in own]
            self._report_without_caption(without, len(files), subset, likely_extension(without, folder.names))
        instead, multiline = subset.class_tokens or "", subset.captions.enable_wildcard
        return [instead if text is None else caption_of_text(text, multiline=multiline) for text in texts]

    def _report_without_caption(self, without: Sequence[str], count: int, subset: SubsetConfig, hint: str) -> None:
        if without and subset.class_tokens is None:
            told = (
                f"{len(without)} of {count} images in {subset.image_dir} have no {subset.caption_extension} file and are trained "
                f"with an empty caption: {names_of(without)}.{hint}"
            )
            paths = [os.path.join(subset.image_dir, name) for name in without]
            self._findings.warning(Kind.NO_CAPTION, subset.image_dir, told, count=len(without), files=paths)

    def _of_metadata(self, subset: SubsetConfig) -> _Listed:
        rules = subset.captions
        mistakes: list[Mistake] = []
        try:
            entries = read_metadata(subset.source, mistakes)
        except UserError as error:
            self._findings.error(Kind.METADATA, subset.source, str(error))
            return _Listed([], [], [], [], [], [])
        for mistake in mistakes:
            self._findings.error(Kind.METADATA, mistake.where, mistake.sentence)
        if not entries and not mistakes:
            self.empty[subset.source] = f"{subset.source} has no entries."
        found = find_images(entries, subset.image_dir, IMAGE_EXTENSIONS, self._findings)
        self._report_left_out(subset, found, names_all=not mistakes)
        places = [os.path.split(path) for path in found]
        folders = {path: number for number, path in enumerate(dict.fromkeys(folder for folder, _ in places))}
        names, folder = [name for _, name in places], [folders[folder] for folder, _ in places]
        facts: list[int | None] = [None] * len(names)
        for path, positions in zip(folders, positions_by_folder(folder, len(folders)), strict=True):
            known, _ = self._facts(self._folder(path), [names[position] for position in positions])
            for position, fact in zip(positions, known, strict=True):
                facts[position] = fact
        captions = [caption_of(entry, rules.caption_separator, multiline=rules.enable_wildcard) for entry in found.values()]
        tags = [entry.tags for entry in found.values()]
        return _Listed([self._folder(path) for path in folders], folder, names, facts, captions, tags)

    def _report_left_out(self, subset: SubsetConfig, found: dict[str, Entry], *, names_all: bool) -> None:
        without = [path for path, entry in found.items() if not entry.caption and not entry.tags]
        if without:
            told = (
                f"{len(without)} of {len(found)} images in {subset.source} have neither caption nor tags and are trained with an "
                f"empty caption: {_some(without)}."
            )
            self._findings.warning(Kind.NO_CAPTION, subset.source, told, count=len(without), files=without)
        if subset.image_dir and names_all:  # an entry with a mistake may be that of an image
            folder = self._folder(subset.image_dir)
            left = [path for name in folder.images if (path := folder.prefix + name) not in found]
            if left:
                told = f"{len(left)} images of {subset.image_dir} have no entry in {subset.source} and are not used: {_some(left)}."
                self._findings.warning(Kind.UNUSED_IMAGES, subset.image_dir, told, count=len(left), files=left)

    def _facts(
        self, folder: FolderFiles, names: Sequence[str], info: InfoFile | None = None
    ) -> tuple[list[int | None], Collection[str]]:
        """Return what is known of the files of images, and the names of those that cannot be used."""
        problems: dict[str, str] = {}
        unknown = without_package(names)
        for why, files in unknown.items():
            told = f"{names_of(files)} {'is' if len(files) == 1 else 'are'} {why}."
            paths = [folder.prefix + name for name in files]
            self._findings.error(Kind.FORMAT, os.path.dirname(paths[0]), told, count=len(files), files=paths)
        foreign = {name for files in unknown.values() for name in files}
        readable = [name for name in names if name not in foreign] if foreign else names
        facts = folder.image_facts(readable, problems, None if info is None else info.images)
        for name, told in problems.items():
            self._findings.error(Kind.UNREADABLE_IMAGE, folder.prefix + name, told)
        if foreign:
            known = dict(zip(readable, facts, strict=True))
            facts = [known.get(name) for name in names]
        return facts, problems.keys() | foreign


def positions_by_folder(folder: Iterable[int], count: int) -> list[list[int]]:
    """Return where the images of each folder stand.

    Args:
        folder: of each image, as a number.
        count: of folders.
    """
    positions: list[list[int]] = [[] for _ in range(count)]
    for position, own in enumerate(folder):
        positions[own].append(position)
    return positions


def _packed(listed: _Listed) -> Pictures:
    """Pack what is known of the images that can be used."""
    used: Sequence[int] | slice = slice(None)
    names, facts, captions, tags = listed.names, listed.facts, listed.captions, listed.tags
    if None in facts:
        used = [position for position, known in enumerate(facts) if known is not None]
        names, captions = [names[position] for position in used], [captions[position] for position in used]
        tags = captions if listed.tags is listed.captions else [listed.tags[position] for position in used]
    sizes, orientations, traits = unpacked_facts([known for known in facts if known is not None])
    packed_captions = Texts(captions)
    return Pictures(
        folders=tuple(folder.prefix for folder in listed.folders),
        real_folders=tuple(folder.real for folder in listed.folders),
        folder=np.array(listed.folder, dtype=np.int32)[used],
        names=Texts(names),
        whole_names=_whole_names(listed)[used],
        sizes=sizes,
        orientations=orientations,
        traits=traits,
        captions=packed_captions,
        tags=packed_captions if tags is captions else Texts(tags),
    )


def _whole_names(listed: _Listed) -> Flags:
    """Say of which images the cache's name keeps the ending.

    Those are all images of one name but the first in the order of endings, whether that is used or not: metadata files may share
    out a folder. `a.webp.png` keeps its own too where `a.webp` keeps its own: both would be `a.webp`.
    """
    is_whole = np.zeros(len(listed.names), dtype=np.bool_)
    if all(len(set(folder.stems)) == len(folder.stems) for folder in listed.folders):
        return is_whole
    owners = [dict(zip(reversed(folder.stems), reversed(folder.images), strict=True)) for folder in listed.folders]
    images = [frozenset(folder.images) for folder in listed.folders]
    for position, (number, name) in enumerate(zip(listed.folder, listed.names, strict=True)):
        is_whole[position] = _keeps_ending(name, owners[number], images[number])
    return is_whole


def _keeps_ending(name: str, owners: dict[str, str], images: Collection[str]) -> bool:
    stem = _stem(name)
    return owners.setdefault(stem, name) != name or (stem in images and _keeps_ending(stem, owners, images))


def _caption_files(folder: FolderFiles, images: Sequence[str], extension: str) -> list[str]:
    """Return the name of each image's caption file, empty if there is none."""
    stems = folder.stems if images is folder.images else [_stem(name) for name in images]
    usual = [stem + extension for stem in stems]
    if folder.names.issuperset(usual):
        return usual
    return [next((name for name in caption_candidates(stem, extension) if name in folder.names), "") for stem in stems]


def _stem(name: str) -> str:
    """Return a file name without its ending; names of images do not begin with a dot."""
    return name.rpartition(".")[0] or name


def _report_traits(pictures: Sequence[Pictures], findings: Findings) -> None:
    """Tell how many images are not plain upright 8-bit pictures."""
    found: dict[tuple[Kind, str], dict[str, None]] = defaultdict(dict)
    for held in pictures:
        for kind, what, flags in (
            (Kind.TURNED, "images are turned", held.orientations != 1),
            (Kind.COLOUR, "images have 16 bits a channel", held.traits & Trait.SIXTEEN_BIT),
            (Kind.COLOUR, "images are CMYK", held.traits & Trait.CMYK),
            (Kind.ANIMATED, "images are animated", held.traits & Trait.ANIMATED),
        ):
            found[kind, what].update((held.path(row), None) for row in np.flatnonzero(flags).tolist())
    for (kind, what), paths in found.items():
        if paths:
            files = sorted(paths)
            told = f"{len(files)} {what}: {_some(files)}."
            findings.warning(kind, os.path.dirname(files[0]), told, count=len(files), files=files)


def _some(paths: Sequence[str]) -> str:
    return names_of([os.path.basename(path) for path in paths])
