"""Change metadata files: their entries as they stand there, so that what nobody asks about stays."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.dataset.formats import IMAGE_EXTENSIONS, list_images
from library.dataset.metadata_file import read_metadata
from library.files.atomic import atomic_write_text
from library.options.errors import UserError

Entries = dict[str, dict[str, Any]]
"""By image: what the file says of it."""


def read_entries(path: str) -> Entries:
    """Read all of a metadata file, a JSON object or JSON lines, in its order.

    Raises:
        UserError: the file cannot be read, or training could not read it.
    """
    checked = read_metadata(path)
    text = Path(path).read_text(encoding="utf-8-sig")
    if path.lower().endswith(".jsonl"):
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        entries = {row.pop("image_path"): row for row in rows}
    else:
        entries = json.loads(text)
    if len(entries) < len(checked):
        twice = Counter(entry.key for entry in checked).most_common(1)[0][0]
        raise UserError(f"{path} has two entries {twice!r}. Remove one of them.")
    return entries


def write_entries(path: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a metadata file as sd-scripts does: indented by two, other letters than ASCII escaped.

    Raises:
        UserError: the disk is full or the folder not writable; the file that was there stays whole.
    """
    atomic_write_text(path, json.dumps(entries, indent=2))


def images_in(folder: str, *, recursive: bool) -> list[str]:
    """Return the images in a folder, sorted by path; hidden files and folders do not count.

    Args:
        folder: as it was typed; paths begin with it.
        recursive: search its sub-folders too.

    Raises:
        UserError: there are none.
    """
    images = list_images(str(Path(folder)))
    for parent, names, _ in os.walk(Path(folder)) if recursive else ():
        names[:] = [name for name in names if not name.startswith(".")]
        for name in names:
            images += list_images(os.path.join(parent, name))
    if not images:
        hint = "" if recursive else " Files directly in it count; --recursive searches its sub-folders."
        raise UserError(f"There are no images ({' '.join(IMAGE_EXTENSIONS)}) in {folder}.{hint}")
    return sorted(images)


def image_key(path: str, *, full_path: bool) -> str:
    """Return the name of an image's entry: its path as it was typed, or its bare name."""
    return str(Path(path)) if full_path else Path(path).stem
