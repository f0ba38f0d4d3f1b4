"""`metadata_cache.json`, in which sd-scripts keeps size and caption of every image of a folder (`cache_info`).

Its entries have `caption` and `resolution`, and nothing by which to tell whether they are still true. Here each entry also says of
which image and caption file it was made, so that only what changed is read again; sd-scripts passes over what it does not know. An
entry of sd-scripts' own gives the caption of an image that has no caption file; the image itself is looked at, since the entry does
not say how it is turned, whether it is whole, nor which image it is of.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from library.dataset.index_store import CaptionRow, ImageRow, packed_facts, unpacked_facts
from library.files.atomic import atomic_write_text
from library.options.errors import UserError

logger = logging.getLogger(__name__)

INFO_NAME = "metadata_cache.json"
_CAPTION_KEYS = ("name", "bytes", "mtime_ns", "text")


class InfoFile:
    """The file of one folder.

    Args:
        folder: as it was given; it begins the keys that are written.
    """

    def __init__(self, folder: str) -> None:
        self._prefix = os.path.join(folder, "")
        self._path = self._prefix + INFO_NAME
        self._written, entries = self._read()
        self.images: dict[str, ImageRow] = dict(_image_rows(entries))
        """What is known of images, by name."""
        self.captions: dict[str, CaptionRow] = dict(_caption_rows(entries))
        """What is known of caption files, by name."""
        self.own_texts = dict(_own_texts(entries))
        """Captions that only this file has, by the name of the image: they count where there is no caption file."""

    def write(self, images: Sequence[tuple[str, str, str]]) -> None:
        """Write what is known now.

        Args:
            images: name, caption file or nothing, and caption of each.
        """
        entries = {}
        for name, caption_file, caption in images:
            if name in self.images:
                own_text = None if caption_file else self.own_texts.get(name)
                entries[self._prefix + name] = _entry(self.images[name], caption, self.captions.get(caption_file), own_text)
        text = json.dumps(entries, ensure_ascii=False, indent=2)
        if text == self._written:
            return
        try:
            atomic_write_text(self._path, text)
        except (OSError, UnicodeEncodeError, UserError) as error:
            logger.warning("%s cannot be written: %s", self._path, error)

    def _read(self) -> tuple[str, dict[str, Mapping[str, Any]]]:
        """Return the text, and the entries by file name: the folder in front of it may have been another one."""
        try:
            with open(self._path, encoding="utf-8-sig") as file:
                text = file.read()
            content = json.loads(text)
            if not isinstance(content, Mapping):
                raise ValueError("it does not hold one JSON object")
        except FileNotFoundError:
            return "", {}
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be used (%s) and is made again.", self._path, error)
            return "", {}
        entries = ((key.replace("\\", "/").rpartition("/")[2], entry) for key, entry in content.items())
        return text, {name: entry for name, entry in entries if isinstance(entry, Mapping)}


def _image_rows(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ImageRow]]:
    """Yield what entries say of images, where they say of which."""
    for name, entry in entries.items():
        size = entry.get("resolution")
        values = [entry.get(key) for key in ("bytes", "mtime_ns", "orientation", "traits")] + (
            size if isinstance(size, list) else []
        )
        numbers = [value for value in values if type(value) is int]
        if len(numbers) == len(values) == 6:
            length, changed, orientation, traits, width, height = numbers
            if 1 <= orientation <= 8 and 0 <= traits < 256 and 0 < width < 1 << 24 and 0 < height < 1 << 24:
                upright = (height, width) if orientation >= 5 else (width, height)
                yield name, (name, length, changed, packed_facts(*upright, orientation, traits))


def _caption_rows(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, CaptionRow]]:
    """Yield what entries say of caption files, where they say of which."""
    for entry in entries.values():
        source = entry.get("caption_file")
        if isinstance(source, Mapping):
            name, length, changed, text = (source.get(key) for key in _CAPTION_KEYS)
            if isinstance(name, str) and isinstance(text, str) and type(length) is int and type(changed) is int:
                yield name, (name, length, changed, text)


def _own_texts(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for name, entry in entries.items():
        text = entry.get("text" if "mtime_ns" in entry else "caption")
        if isinstance(text, str) and text:
            yield name, text


def _entry(image: ImageRow, caption: str, caption_file: CaptionRow | None, own_text: str | None) -> dict[str, Any]:
    """Return an entry; its resolution is that of the stored picture, since sd-scripts does not turn pictures."""
    sizes, orientations, traits = unpacked_facts([image[3]])
    upright, orientation = sizes[0].tolist(), int(orientations[0])
    return {
        "caption": caption,
        "resolution": upright[::-1] if orientation >= 5 else upright,
        "bytes": image[1],
        "mtime_ns": image[2],
        "orientation": orientation,
        "traits": int(traits[0]),
        "caption_file": None if caption_file is None else dict(zip(_CAPTION_KEYS, caption_file, strict=True)),
        "text": own_text,
    }
