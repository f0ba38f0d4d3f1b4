"""Put the text files that lie beside images into a metadata file."""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from library.dataset.caption_files import find_caption_file, read_text
from library.dataset.formats import IMAGE_EXTENSIONS
from library.dataset.metadata_edit import image_key, images_in, read_entries, write_entries
from library.options.console import say
from library.options.errors import UserError
from library.options.metadata_tools import MergeRequest

logger = logging.getLogger(__name__)


def merge_texts(request: MergeRequest, field: str) -> None:
    """Give the entry of every image the text of its file, and write the entries, those of other images included.

    Args:
        request: the folder and the files.
        field: of the entries: `caption` or `tags`; what stood there is replaced.

    Raises:
        UserError: text files are missing or cannot be read, all of which are named; then nothing is written.
    """
    entries = read_entries(request.in_json) if request.in_json else {}
    known = set(entries)
    texts = _read_texts(images_in(request.train_data_dir, recursive=request.recursive), request.extension)
    _warn_of_empty(texts, request.extension)
    owners: dict[str, list[str]] = defaultdict(list)
    for image, text in texts.items():
        key = image_key(image, full_path=request.full_path)
        owners[key].append(image)
        entries.setdefault(key, {})[field] = text
        if request.debug:
            say(f"{key}: {text}")
    _warn_of_shared(owners)
    write_entries(request.out_json, entries)
    new = len(owners.keys() - known)
    others = f"; {len(known - owners.keys())} entries of other images stay" if known - owners.keys() else ""
    say(f"Wrote {request.out_json}: {field} of {len(texts)} images, {new} entries new{others}.")


def _read_texts(images: Sequence[str], extension: str) -> dict[str, str]:
    """Return the text of each image, stripped; lines stay."""
    texts: dict[str, str] = {}
    without, problems = [], []
    for image in images:
        file = find_caption_file(image, extension)
        if file is None:
            without.append(image)
            continue
        try:
            texts[image] = read_text(file).strip()
        except UserError as error:
            problems.append(str(error))
    if len(without) == len(images):
        folder = os.path.dirname(without[0]) or "."
        raise UserError(
            f"None of the {len(images)} images has a {extension} file, {without[0]} for one. "
            f"--caption_extension names their ending; {_endings(folder)}."
        )
    problems = [f"{image} has no {extension} file." for image in without] + problems
    if problems:
        head = f"{len(problems)} of {len(images)} images have no text that can be read:"
        raise UserError("\n".join([head, *(f"  {problem}" for problem in problems), "Nothing was written."]))
    return texts


def _endings(folder: str) -> str:
    """Tell how the files of a folder that are not images end, the most frequent ending first."""
    counts = Counter(os.path.splitext(name)[1] for name in sorted(os.listdir(folder)))
    ranked = [ending for ending, _ in counts.most_common() if ending and ending.lower() not in IMAGE_EXTENSIONS]
    return f"other files there end in {', '.join(ranked[:8])}" if ranked else "there are no other files"


def _warn_of_empty(texts: Mapping[str, str], extension: str) -> None:
    empty = [image for image, text in texts.items() if not text]
    if empty:
        logger.warning("%d %s files are empty, that of %s for one.", len(empty), extension, empty[0])


def _warn_of_shared(owners: Mapping[str, Sequence[str]]) -> None:
    """Tell of entries that several images have."""
    shared = [images for images in owners.values() if len(images) > 1]
    if shared:
        logger.warning(
            "%d entries stand for several images, of which one is trained: %s, for one. "
            "Give the images different names, or name entries by --full_path.",
            len(shared), " and ".join(shared[0]),
        )  # fmt: skip
