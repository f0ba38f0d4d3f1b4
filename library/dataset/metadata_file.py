"""Read a metadata file: the images of a dataset with their captions and tags, in one JSON object or in JSON lines."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.dataset.caption_files import lines_of
from library.dataset.findings import Findings, Kind
from library.options.errors import UserError

_MISTAKES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Mistake:
    """What is wrong with one entry."""

    where: str
    """The file, and the entry or line."""
    sentence: str
    """Names the place too."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the file says of one image."""

    key: str
    """A path, or one relative to the image folder, with or without its extension."""
    caption: str
    tags: str
    where: str
    """Where in the file it stands, for messages."""


def read_metadata(path: str, mistakes: list[Mistake] | None = None) -> list[Entry]:
    """Read a `.jsonl` file with an object per line, or a JSON object from image keys to entries; longest keys come first.

    Of an entry `caption` and `tags` are read, and in JSON lines `image_path`, its key. Sizes are read from the images, since those
    of the file may be out of date.

    Args:
        path: of the file.
        mistakes: receives every entry that is not what it should be; such entries are left out. Without it, they are raised.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or not JSON, or there are wrong entries and no `mistakes` to take them.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}). Save it as UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    found: list[Mistake] = []
    rows = _json_lines(path, text, found) if path.lower().endswith(".jsonl") else _json_object(path, text)
    entries = [entry for where, key, value in rows if (entry := _entry(where, key, value, found)) is not None]
    if mistakes is not None:
        mistakes += found
    elif found:
        more = f" and {len(found) - _MISTAKES_SHOWN} more mistakes" if len(found) > _MISTAKES_SHOWN else ""
        raise UserError(" ".join(mistake.sentence for mistake in found[:_MISTAKES_SHOWN]) + more)
    return sorted(entries, key=lambda entry: -len(entry.key))


def find_images(entries: Sequence[Entry], image_dir: str, endings: Sequence[str], findings: Findings) -> dict[str, Entry]:
    """Find the image of every entry: its key as a path, else in the image folder, else there with one of the known endings.

    Args:
        entries: of one metadata file.
        image_dir: the folder that keys are relative to; empty where there is none.
        endings: of image files, in lower case.
        findings: receives each entry without an image (one sentence for all where none has any), and each image with two entries.

    Returns:
        The entries by the path of their image, in their order.
    """
    names_in = _FolderNames()
    images = [next(filter(names_in.has, _candidates(entry.key, image_dir, endings, names_in)), None) for entry in entries]
    looked = f" or in {image_dir}" if image_dir else "; image_dir names the folder that keys are relative to"
    if len(images) > 1 and not any(images):
        told = (
            f"{entries[0].where}: there is no image {entries[0].key!r} here{looked}, nor one for any of the other "
            f"{len(entries) - 1} entries. Check the folder."
        )
        findings.error(Kind.UNRESOLVED, entries[0].where, told, count=len(entries))
        return {}
    found: dict[str, Entry] = {}
    owners: dict[str, Entry] = {}
    for entry, image in zip(entries, images, strict=True):
        if image is None:
            told = f"{entry.where}: there is no image {entry.key!r} here{looked}. Remove the entry or put the image back."
            findings.error(Kind.UNRESOLVED, entry.where, told)
            continue
        other = owners.setdefault(names_in.identity(image), entry)
        if other is not entry:
            told = f"{entry.where}: {image} has two entries, {other.key!r} and {entry.key!r}. Remove one of them."
            findings.error(Kind.UNRESOLVED, entry.where, told)
            continue
        found[image] = entry
    return found


def caption_of(entry: Entry, separator: str, *, multiline: bool) -> str:
    """Return the caption of an entry: its caption, the separator, and its tags.

    Args:
        entry: of the file.
        separator: `caption_separator`, put in without a blank.
        multiline: whether a caption is chosen from several lines (`enable_wildcard`); then every line gets the tags, and line
            breaks among the tags count as separators. Otherwise only the first line is used.
    """
    if not multiline:
        return separator.join(text for text in (entry.caption, entry.tags) if text).split("\n")[0]
    tags = separator.join(line.strip() for line in lines_of(entry.tags) if line.strip())
    lines = [line.strip() for line in lines_of(entry.caption) if line.strip()] or [""]
    return "\n".join(separator.join(text for text in (line, tags) if text) for line in lines)


class _FolderNames:
    """Tells whether files exist, and which are the same, looking at each folder once."""

    def __init__(self) -> None:
        self._folders: dict[str, tuple[str, frozenset[str], frozenset[str]]] = {}
        self._oddly_spelled: dict[str, dict[str, list[str]]] = {}

    def has(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in self._looked_at(folder)[1]

    def with_ending(self, path: str) -> Iterator[str]:
        """Yield the files that have a path but for the spelling of its ending, which is given in lower case."""
        yield path
        stem, ending = os.path.splitext(path)
        yield stem + ending.upper()
        folder, name = os.path.split(path)
        if folder not in self._oddly_spelled:
            by_name = self._oddly_spelled[folder] = {}
            for own in sorted(self._looked_at(folder)[1]):
                start, spelled = os.path.splitext(own)
                if spelled not in (spelled.lower(), spelled.upper()):
                    by_name.setdefault(start + spelled.lower(), []).append(own)
        yield from (os.path.join(folder, own) for own in self._oddly_spelled[folder].get(name, ()))

    def identity(self, path: str) -> str:
        """Return the path of an existing file that is the same from wherever it is seen."""
        folder, name = os.path.split(path)
        real, _, links = self._looked_at(folder)
        return os.path.realpath(path) if name in links else os.path.join(real, name)

    def _looked_at(self, folder: str) -> tuple[str, frozenset[str], frozenset[str]]:
        """Return the folder's real path, the names of its files, and those of them that are links."""
        if folder not in self._folders:
            try:
                with os.scandir(folder or ".") as entries:
                    files = [(entry.name, entry.is_symlink()) for entry in entries if entry.is_file()]
            except OSError:
                files = []
            names, links = (name for name, _ in files), (name for name, is_link in files if is_link)
            self._folders[folder] = os.path.realpath(folder), frozenset(names), frozenset(links)
        return self._folders[folder]


def _candidates(key: str, image_dir: str, endings: Sequence[str], names_in: _FolderNames) -> Iterator[str]:
    """Yield the paths an image may have; a key that has no ending of an image is never a path itself."""
    places = [key] if os.path.isabs(key) or not image_dir else [key, os.path.join(image_dir, key)]
    if os.path.splitext(key)[1].lower() in endings:
        yield from places
    for place in places:
        for ending in sorted(endings):
            yield from names_in.with_ending(place + ending)


def _json_object(path: str, text: str) -> Iterator[tuple[str, Any, Any]]:
    try:
        content = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
    if not isinstance(content, _Pairs):
        raise UserError(f"{path} must hold one JSON object whose keys are images; files with an object per line end in .jsonl.")
    for key, value in content.pairs:
        yield f"{path}, entry {key!r}", key, dict(value.pairs) if isinstance(value, _Pairs) else value


def _json_lines(path: str, text: str, mistakes: list[Mistake]) -> Iterator[tuple[str, Any, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):  # unlike splitlines, not at U+2028 and the like inside of texts
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                mistakes.append(Mistake(where, f"{where} is not valid JSON: {error.msg} at column {error.colno}."))
                continue
            key = value.get("image_path") if isinstance(value, Mapping) else None
            yield where, key, value


class _Pairs:
    """A JSON object that keeps keys that stand there twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def _entry(where: str, key: Any, value: Any, mistakes: list[Mistake]) -> Entry | None:
    if not isinstance(value, Mapping):
        mistakes.append(Mistake(where, f"{where} must be an object with caption or tags, not {value!r}."))
        return None
    if not isinstance(key, str) or not key:
        mistakes.append(Mistake(where, f"{where} has no image_path."))
        return None
    texts = {name: value.get(name) or "" for name in ("caption", "tags")}
    wrong = [name for name, text in texts.items() if not isinstance(text, str)]
    if wrong:
        mistakes.append(Mistake(where, f"{where}: {wrong[0]} must be a text in quotes, but it is {value[wrong[0]]!r}."))
        return None
    return Entry(key, texts["caption"].strip(), texts["tags"].strip(), where)
