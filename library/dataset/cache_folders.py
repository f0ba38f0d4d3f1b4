"""Folders that caches are to be written to, and cannot be."""

import os
from collections import Counter
from collections.abc import Iterable

from library.dataset.dataset import Dataset
from library.dataset.findings import NAMES_SHOWN, Findings, Kind
from library.options.errors import UserError

_ADVICE = "Allow writing there, cache in memory (without _to_disk), or make the caches where it is allowed and bring them here."


def locked_folders(dataset: Dataset) -> frozenset[str]:
    """Return the folders of images in which this process may not write."""
    folders = {folder for section in dataset.sections for folder in section.items.cache_folders()}
    return frozenset(folder for folder in folders if not _may_write(folder))


def report_locked(findings: Findings, kind: str, files: Iterable[str]) -> None:
    """Note, for each folder, the cache files that have to be written to it and cannot be.

    Args:
        findings: receive an error for each folder.
        kind: what is cached, for the sentence: "latents", "text outputs".
        files: all in folders in which this process may not write.
    """
    for folder, sentence, count in _by_folder(kind, files):
        findings.error(Kind.CACHE, f"{folder}: {kind}", f"{sentence} {_ADVICE}", count=count)


def require_writable(kind: str, files: Iterable[str]) -> None:
    """Make sure that cache files can be written.

    Raises:
        UserError: some cannot; it names the folders.
    """
    locked = [path for path in files if not _may_write(os.path.dirname(path))]
    if told := [sentence for _, sentence, _ in _by_folder(kind, locked)]:
        more = f"\n…and {len(told) - NAMES_SHOWN} more folders." if len(told) > NAMES_SHOWN else ""
        raise UserError("\n".join(told[:NAMES_SHOWN]) + f"{more}\n{_ADVICE}")


def _may_write(folder: str) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _by_folder(kind: str, files: Iterable[str]) -> list[tuple[str, str, int]]:
    """Return each folder, what is wrong with it, and how many files are to be written there."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for path in files:
        folder, name = os.path.split(path)
        counts[folder] += 1
        examples.setdefault(folder, name)
    return [
        (folder, f"{count} files of {kind} cannot be written to {folder}, such as {examples[folder]}: no permission.", count)
        for folder, count in counts.items()
    ]
