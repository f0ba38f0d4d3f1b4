"""Everything about a dataset that can be known before a model is loaded, checked in one go.

The index has looked at every file; here its images are looked at together, as training will use them.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from library.dataset.caption_files import caption_candidates
from library.dataset.collector import without_collector
from library.dataset.columns import Flags
from library.dataset.dataset import Dataset
from library.dataset.duplicates import same_contents, same_files
from library.dataset.findings import MOST_KEPT, NAMES_SHOWN, Findings, Kind
from library.dataset.index import Section
from library.dataset.survey import Survey, survey
from library.dataset.token_counts import CountTokens, TokenCounter, longest_captions
from library.models.new_words import mentions
from library.options.dataset_config import SubsetConfig

NOTABLE_ENLARGEMENT = 1.1
NOTABLE_CUT = 0.2
_MOST_COMPARED = 20_000
"""Images of a dataset up to which copies are looked for at every start; among more, only where a report is asked for."""


@dataclass(frozen=True)
class Limits:
    """What the dataset is held against."""

    count_tokens: CountTokens
    """Of the model family."""
    max_tokens: int
    """That the text encoders read of a caption."""
    num_processes: int = 1
    compares_all: bool = False
    """Whether copies are looked for however many images there are."""
    weighted_captions: bool = False
    """Whether brackets in captions are weights, which are no tokens."""
    new_word: str | None = None
    """That captions have to mention; None where no word is learned."""


@dataclass(frozen=True)
class Checked:
    """A dataset after all checks."""

    dataset: Dataset
    survey: Survey
    findings: Findings
    limits: Limits
    copies: list[list[str]]
    """Groups of files with the same content."""


@without_collector()
def check_dataset(dataset: Dataset, findings: Findings, limits: Limits) -> Checked:
    """Add to the findings what the index cannot see: captions too long, sizes that do not suit, copies, buckets not filled."""
    surveyed = survey(dataset, TokenCounter(limits.count_tokens, limits.max_tokens, weighted=limits.weighted_captions))
    _check_captions(dataset, surveyed, findings, limits.max_tokens)
    _check_empty_captions(dataset, surveyed, findings)
    if limits.new_word is not None:
        _check_word(dataset, surveyed, findings, limits.new_word)
    copies: dict[tuple[str, ...], list[str]] = {}
    for number, section in enumerate(dataset.sections):
        _check_sizes(dataset, number, surveyed, findings)
        _check_stems(dataset, number, surveyed, findings)
        for group in _check_copies(section, findings, limits.compares_all):
            copies.setdefault(tuple(group), group)
    _check_buckets(dataset, findings, limits.num_processes)
    return Checked(dataset, surveyed, findings, limits, list(copies.values()))


def section_label(section: Section, number: int) -> str:
    """Return what a dataset of the file is called: its position, counted from 1, and its size."""
    width, height = section.config.resolution
    return f"dataset {number + 1} ({width}x{height})"


def largest(values: np.ndarray[Any, Any], chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> list[int]:
    """Return the numbers of the chosen items, that of the largest value first."""
    numbers = np.flatnonzero(chosen)
    order: list[int] = numbers[np.argsort(-values[numbers], kind="stable")].tolist()
    return order


def _check_captions(dataset: Dataset, surveyed: Survey, findings: Findings, limit: int) -> None:
    tokens = surveyed.tokens
    for subset, own in _subsets(dataset, surveyed):
        too_long = largest(tokens, own & (tokens > limit))
        if too_long:
            names, paths = _examples(dataset, too_long, lambda number: f"{tokens[number]} tokens")
            told = f"{len(too_long)} of {own.sum()} captions of {subset.source} are longer than {limit} tokens: {names}."
            findings.warning(Kind.LONG_CAPTION, subset.source, told, count=len(too_long), files=paths)


def _check_empty_captions(dataset: Dataset, surveyed: Survey, findings: Findings) -> None:
    """Tell of captions that are there and empty; of missing ones the index has told, and empty class tokens are meant."""
    for subset, own in _subsets(dataset, surveyed):
        told = [problem for problem in findings.warnings_of(Kind.NO_CAPTION) if problem.where == subset.source]
        known = {path for problem in told for path in problem.files}
        unread = _without_readable_caption(dataset, subset, own & surveyed.is_empty, findings)
        known.update(unread)
        count = int((own & surveyed.is_empty).sum()) - sum(problem.count for problem in told) - len(unread)
        if count > 0 and subset.class_tokens != "":
            empty = np.flatnonzero(own & surveyed.is_empty).tolist()
            unknown = (number for number in empty if not known or dataset.items[number].path not in known)
            numbers = list(islice(unknown, count))
            names, paths = _examples(dataset, numbers)
            sentence = f"{count} of {own.sum()} images of {subset.source} have an empty caption: {names}."
            findings.warning(Kind.EMPTY_CAPTION, subset.source, sentence, count=count, files=paths)


def _check_word(dataset: Dataset, surveyed: Survey, findings: Findings, word: str) -> None:
    """Tell of captions that do not mention a word that is learned from them; those of regularisation images aside."""
    teaches, mentioned = [], []
    for section in dataset.sections:
        teaches.append(~section.items.is_reg)
        texts = zip(section.items.captions(), longest_captions(section), strict=True)
        mentioned.append(np.fromiter((mentions(own, word) or mentions(used, word) for own, used in texts), dtype=np.bool_))
    without = np.concatenate([np.zeros(0, dtype=np.bool_), *teaches]) & ~np.concatenate([np.zeros(0, dtype=np.bool_), *mentioned])
    if without.any() and without.sum() == sum(each.sum() for each in teaches):
        told = (
            f"No caption has the word {word} in it, so nothing would be learned. Write it into the captions, set class_tokens or "
            "caption_prefix to it, or give --use_object_template or --use_style_template."
        )
        findings.error(Kind.WITHOUT_WORD, "all datasets", told, count=int(without.sum()))
        return
    for subset, own in _subsets(dataset, surveyed):
        numbers = np.flatnonzero(own & without).tolist()
        if numbers:
            names, paths = _examples(dataset, numbers)
            told = f"{len(numbers)} of {own.sum()} captions of {subset.source} do not have the word {word}: {names}."
            findings.warning(Kind.WITHOUT_WORD, subset.source, told, count=len(numbers), files=paths)


def _without_readable_caption(dataset: Dataset, subset: SubsetConfig, empty: Flags, findings: Findings) -> set[str]:
    """Return the images, of those whose caption is empty, whose caption file cannot be read."""
    bad = {problem.where for problem in findings.errors_of(Kind.UNREADABLE_CAPTION)}
    paths = (dataset.items[number].path for number in np.flatnonzero(empty).tolist()) if bad else ()
    return {path for path in paths if not bad.isdisjoint(caption_candidates(os.path.splitext(path)[0], subset.caption_extension))}


def _check_sizes(dataset: Dataset, section: int, surveyed: Survey, findings: Findings) -> None:
    own, label = surveyed.section == section, section_label(dataset.sections[section], section)
    enlarged = largest(surveyed.enlargement, own & (surveyed.enlargement > NOTABLE_ENLARGEMENT))
    if enlarged:
        names, paths = _examples(dataset, enlarged, lambda number: f"{surveyed.enlargement[number]:.1f} times")
        told = f"{len(enlarged)} of {own.sum()} images of {label} are enlarged: {names}."
        findings.warning(Kind.UPSCALED, label, told, count=len(enlarged), files=paths)
    cut = largest(surveyed.cut_off, own & (surveyed.cut_off > NOTABLE_CUT))
    if cut:
        names, paths = _examples(dataset, cut, lambda number: f"{surveyed.cut_off[number]:.0%}")
        told = f"{len(cut)} of {own.sum()} images of {label} lose more than {NOTABLE_CUT:.0%} of their area: {names}."
        findings.warning(Kind.CROPPED, label, told, count=len(cut), files=paths)


def _check_stems(dataset: Dataset, section: int, surveyed: Survey, findings: Findings) -> None:
    own = surveyed.section == section
    later = np.flatnonzero(surveyed.shares_stem & own).tolist()
    if later:
        label = section_label(dataset.sections[section], section)
        names, paths = _examples(dataset, later)
        told = f"{len(later)} of {own.sum()} images of {label} have the name of another image, but for the ending: {names}."
        findings.warning(Kind.SAME_STEM, label, told, count=len(later), files=paths)


def _check_copies(section: Section, findings: Findings, compares_all: bool) -> list[list[str]]:
    """Look for images of one dataset that are the same; the same image in several datasets is how to train it at several sizes."""
    if len(section.items) > _MOST_COMPARED and not compares_all:
        return []
    paths: dict[str, None] = {}
    for path in section.items.paths():
        if path in paths:
            findings.warning(Kind.DUPLICATE_PATH, path, f"{path} is listed by two subsets of one dataset.")
        paths[path] = None
    listed_twice, same_size = same_files(paths)
    for group in listed_twice:
        told = f"{group[1]} is the same file as {group[0]}."
        findings.warning(Kind.DUPLICATE_PATH, group[1], told, count=len(group) - 1, files=group)
    copies = same_contents(same_size)
    for group in copies:
        told = f"{', '.join(group[1 : NAMES_SHOWN + 1])} {'has' if len(group) == 2 else 'have'} the same content as {group[0]}."
        findings.warning(Kind.SAME_CONTENT, group[1], told, count=len(group) - 1, files=group)
    return listed_twice + copies


def _check_buckets(dataset: Dataset, findings: Findings, num_processes: int) -> None:
    for (number, bucket), uses in dataset.buckets.items():
        section = dataset.sections[number]
        wanted = section.config.batch_size * num_processes
        if len(uses) < wanted:
            label = section_label(section, number)
            told = f"{label}: the bucket {bucket[0]}x{bucket[1]} has {len(uses)} of the {wanted} images of a batch."
            findings.warning(Kind.SMALL_BUCKET, f"{label}: {bucket[0]}x{bucket[1]}", told)


def _subsets(dataset: Dataset, surveyed: Survey) -> Iterator[tuple[SubsetConfig, np.ndarray[Any, np.dtype[np.bool_]]]]:
    """Yield each subset, with whether each item belongs to it."""
    for number, section in enumerate(dataset.sections):
        for position, subset in enumerate(section.config.subsets):
            yield subset, (surveyed.section == number) & (surveyed.subset == position)


def _examples(dataset: Dataset, numbers: list[int], detail: Callable[[int], str] | None = None) -> tuple[str, list[str]]:
    """Return the first few items for a sentence, and the paths of as many as findings keep."""
    paths = [dataset.items[number].path for number in numbers[:MOST_KEPT]]
    names = [os.path.basename(path) for path in paths[:NAMES_SHOWN]]
    if detail is not None:
        names = [f"{name} ({detail(number)})" for name, number in zip(names, numbers, strict=False)]
    more = f" and {len(numbers) - NAMES_SHOWN} more" if len(numbers) > NAMES_SHOWN else ""
    return ", ".join(names) + more, paths
