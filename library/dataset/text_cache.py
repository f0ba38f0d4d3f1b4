"""Encode every text that captions become once: find which outputs are cached and still right, and make the others."""

import hashlib
import os
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import filterfalse
from threading import Lock
from typing import Any

import numpy as np

from library.dataset.cache_folders import require_writable
from library.dataset.cache_stamps import STAMP_FORMAT, CacheReport, Progress, Stamp, add_stamp, counted, read_stamp
from library.dataset.cached import TextFiles, TextsInMemory, stored_texts, variant_suffix
from library.dataset.caption_files import find_caption_file
from library.dataset.dataset import Dataset
from library.dataset.file_notes import FileNotes
from library.dataset.text_cost import TextCost
from library.dataset.text_encoder import TextEncoder
from library.files.npz import Arrays, read_npz, write_npz
from library.models.prompt_weights import has_weights
from library.options.errors import UserError
from library.options.groups.cache import CacheOptions

_CHECKING_THREADS = 8


def cache_text_outputs(
    dataset: Dataset,
    encoder: TextEncoder,
    options: CacheOptions,
    *,
    trust_foreign: bool,
    process_index: int = 0,
    num_processes: int = 1,
    progress: Progress | None = None,
) -> CacheReport:
    """Give the dataset the outputs of every text its captions become, and of the empty caption where some uses drop theirs.

    In memory, every process encodes all texts, each once. On disk, each process checks and encodes its share of the files, and all
    must wait for each other before they read.

    Args:
        dataset: receives the outputs; from then on its captions are those texts.
        encoder: makes them.
        options: memory or disk, how many variants, and whether existing files are looked into.
        trust_foreign: use files of other programs. They are right for diffusers folders; for single-file checkpoints sd-scripts
            applies the projection of the pooled output the wrong way round.
        process_index: of this process.
        num_processes: that share the files.
        progress: told of each text.

    Raises:
        UserError: outputs are not finite, or the disk is full.
    """
    report = CacheReport("Captions")
    dataset.text_variants = options.text_cache_variants
    on_disk = options.cache_text_encoder_outputs_to_disk
    cost = TextCost(dataset, options, encoder.batch_size, num_processes if on_disk else 1)
    if on_disk:
        files = TextFiles(encoder.family.text_cache, _dropping(dataset), is_trusted=options.skip_cache_check)
        jobs = _jobs(dataset, files)[process_index::num_processes]
        _fill_files(jobs, _Checker(dataset, files, encoder, options.skip_cache_check, trust_foreign), report, cost, progress)
        dataset.texts = files
    else:
        texts = _all_texts(dataset)
        report.made["kept in memory"] = len(texts)
        outputs = cost.watched(encoder.encode(texts), len(texts), len(texts))
        dataset.texts = TextsInMemory(dict(counted(outputs, len(texts), progress)))
    return report


def survey_text_outputs(dataset: Dataset, encoder: TextEncoder, options: CacheOptions, *, trust_foreign: bool) -> CacheReport:
    """Say what `cache_text_outputs` would find on the disk and make, without making it; no model is loaded.

    The dataset's captions are the texts of the cache from then on. Whether files of other programs are of the same
    `--max_token_length` is not looked at, since that takes the text encoders.
    """
    report = CacheReport("Captions")
    dataset.text_variants = options.text_cache_variants
    files = TextFiles(encoder.family.text_cache, _dropping(dataset), is_trusted=options.skip_cache_check)
    _unfinished(_jobs(dataset, files), _CheckerOfStamps(dataset, files, encoder, options.skip_cache_check, trust_foreign), report)
    return report


def text_files_to_write(
    dataset: Dataset, encoder: TextEncoder, options: CacheOptions, folders: Container[str], *, trust_foreign: bool
) -> list[str]:
    """Return the files in some folders that `cache_text_outputs` would write; see `survey_text_outputs`."""
    dataset.text_variants = options.text_cache_variants
    files = TextFiles(encoder.family.text_cache, _dropping(dataset), is_trusted=options.skip_cache_check)
    jobs = [job for job in _jobs(dataset, files) if os.path.dirname(job.path) in folders]
    checker = _CheckerOfStamps(dataset, files, encoder, options.skip_cache_check, trust_foreign)
    return [each.job.path for each in _unfinished(jobs, checker, CacheReport("Captions"))]


@dataclass(frozen=True)
class _Job:
    """A file, and the numbers of the items whose texts it holds; none for the empty caption."""

    path: str
    items: list[int] = field(default_factory=list)


def _jobs(dataset: Dataset, files: TextFiles) -> list[_Job]:
    jobs: dict[str, _Job] = {}
    empty: dict[str, _Job] = {}
    for item in dataset.encoded_items:
        path = files.path(item)
        jobs.setdefault(path, _Job(path)).items.append(item.number)
        if (item.section, item.subset) in files.dropping:
            path = files.empty_path(item)
            empty.setdefault(path, _Job(path))
    return [*jobs.values(), *empty.values()]


def _dropping(dataset: Dataset) -> frozenset[tuple[int, int]]:
    """Return (section, subset) of images with uses that have no caption."""
    return frozenset(
        (number, position)
        for number, section in enumerate(dataset.config.sections)
        for position, subset in enumerate(section.subsets)
        if subset.captions.drops_captions
    )


def _texts(dataset: Dataset, job: _Job) -> tuple[str, ...]:
    """Return the texts of a file, in their order."""
    if not job.items:
        return ("",)
    items = dataset.encoded_items
    return tuple(dict.fromkeys(text for number in job.items for text in dataset.cached_texts(items[number])))


def _all_texts(dataset: Dataset) -> list[str]:
    texts = dict.fromkeys(text for item in dataset.encoded_items for text in dataset.cached_texts(item))
    return list(texts | ({"": None} if _dropping(dataset) else {}))


@dataclass
class _Unfinished:
    """A file some of whose texts are being encoded."""

    job: _Job
    texts: tuple[str, ...]
    found: frozenset[str]
    """Texts that stay as they are in the file."""
    made: dict[str, Arrays] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        return [text for text in self.texts if text not in self.found]


def _fill_files(jobs: Sequence[_Job], checker: "_Checker", report: CacheReport, cost: TextCost, progress: Progress | None) -> None:
    unfinished = _unfinished(jobs, checker, report)
    require_writable("text outputs", [each.job.path for each in unfinished])
    total = report.kept + report.made.total()
    waiting: dict[str, list[_Unfinished]] = {}
    for file in unfinished:
        for text in file.missing:
            waiting.setdefault(text, []).append(file)
    if jobs and not waiting:
        cost.tell(total, sum(os.path.getsize(job.path) for job in jobs), None)
    outputs = cost.watched(checker.encoder.encode(list(waiting)), len(waiting), total)
    for text, cond in counted(outputs, len(waiting), progress):
        arrays = checker.encoder.family.text_cache.pack(cond)
        for file in waiting.pop(text):
            file.made[text] = arrays
            if len(file.made) == len(file.texts) - len(file.found):
                _write(file, checker)
                file.made.clear()


def _unfinished(jobs: Sequence[_Job], checker: "_Checker", report: CacheReport) -> list[_Unfinished]:
    """Look into all files, note what is there, and return those that lack a text."""
    unfinished: list[_Unfinished] = []
    with ThreadPoolExecutor(_CHECKING_THREADS) as pool:
        for job, verdict in zip(jobs, pool.map(checker.verdict, jobs), strict=True):
            missing = len(verdict.texts) - len(verdict.found)
            report.kept += len(verdict.found)
            if missing:
                report.made[verdict.reason] += missing
                unfinished.append(_Unfinished(job, verdict.texts, verdict.found))
    checker.notes.save()
    return unfinished


def _write(file: _Unfinished, checker: "_Checker") -> None:
    """Write a file with the texts that were made and those that were found in it."""
    by_text = file.made | (checker.files.read_all(file.job.path, file.found) if file.found else {})
    arrays = {name + variant_suffix(i): array for i, text in enumerate(file.texts) for name, array in by_text[text].items()}
    write_npz(file.job.path, add_stamp(arrays, checker.stamp(file.texts)))


_REASONS = {
    "format": "in an older form",
    "text_encoders": "of other text encoders",
    "dtype": "in another precision",
    "max_token_length": "of another --max_token_length",
}
"""By part of the stamp: why the texts of a file are encoded again, in the order in which the parts are compared."""


_OTHER_WEIGHTS = "with brackets that are read in another way"


@dataclass(frozen=True)
class _Verdict:
    """What a file has of what it should have."""

    texts: tuple[str, ...]
    found: frozenset[str]
    reason: str
    """Why the others have to be made."""


class _Checker:
    """Decides whether a file has what would be made."""

    def __init__(self, dataset: Dataset, files: TextFiles, encoder: TextEncoder, trust_existing: bool, trust_foreign: bool) -> None:
        self.encoder = encoder
        self.files = files
        self.notes = FileNotes()
        self._dataset = dataset
        self._trust_existing = trust_existing
        self._trust_foreign = trust_foreign
        self._weighs = encoder.style is not None
        self._lock = Lock()
        self._known_shapes: dict[str, tuple[int, ...]] | None = None
        self._common: Stamp = {
            "format": STAMP_FORMAT,
            "text_encoders": encoder.family.fingerprint("text_encoders"),
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "max_token_length": encoder.max_token_length,
        }

    def stamp(self, texts: Sequence[str]) -> Stamp:
        """Return what is noted in a file with these texts; weights are only where brackets were read as such."""
        weights = {"weighted": True} if self._weighs else {}
        return self._common | {"caption": texts[0], "variants": list(texts[1:])} | weights

    def verdict(self, job: _Job) -> _Verdict:
        """Look into a file."""
        texts = _texts(self._dataset, job)
        if not os.path.exists(job.path):
            return _Verdict(texts, frozenset(), "new")
        if self._trust_existing:
            return _Verdict(texts, frozenset(texts), "")
        status = os.stat(job.path)
        noted = self.notes.texts(job.path, status)  # only of files of other programs
        if noted and self._question(job, texts) in noted:
            return _Verdict(texts, frozenset(texts), "")
        try:
            stamp = read_stamp(job.path)
            if stamp is None:
                reason = self._foreign(read_npz(job.path), job, texts)
                if reason is None:
                    self._accept(job, status, texts)
                return _Verdict(texts, frozenset() if reason else frozenset(texts), reason or "")
            return self._compared(stamp, texts)
        except UserError:
            return _Verdict(texts, frozenset(), "damaged")

    def _compared(self, stamp: Stamp, texts: tuple[str, ...]) -> _Verdict:
        reason = next((_REASONS[part] for part in _REASONS if stamp.get(part) != self._common[part]), None)
        if reason:
            return _Verdict(texts, frozenset(), reason)
        stored = frozenset(texts) & frozenset(stored_texts(stamp))
        found = stored if stamp.get("weighted", False) == self._weighs else frozenset(filterfalse(has_weights, stored))
        if found < stored:
            return _Verdict(texts, found, _OTHER_WEIGHTS)
        return _Verdict(texts, found, "of further variants" if found else "of a caption that changed")

    def _question(self, job: _Job, texts: tuple[str, ...]) -> str:
        """Return all that the judgement on a file of another program depends on, but for the file."""
        changed = None if (caption := self._caption_file(job)) is None else os.stat(caption).st_mtime_ns
        return hashlib.sha256(repr((self._common, self._trust_foreign, self._weighs, texts, changed)).encode()).hexdigest()

    def _accept(self, job: _Job, status: os.stat_result, texts: tuple[str, ...]) -> None:
        self.notes.add(job.path, status, self._question(job, texts))

    def _caption_file(self, job: _Job) -> str | None:
        item = self._dataset.encoded_items[job.items[0]]
        return find_caption_file(item.path, self._dataset.sections[item.section].subset(item).caption_extension)

    def _foreign(self, arrays: Arrays, job: _Job, texts: tuple[str, ...]) -> str | None:
        """Judge a file of another program: it holds the caption as the file beside the image had it then."""
        required = self.files.spec.required_keys
        if not required <= arrays.keys() or not _all_finite(arrays, required):
            return "damaged"
        if not self._trust_foreign:
            return "from another program, whose pooled output is not right for a single-file checkpoint"
        if any(arrays[name].shape != shape for name, shape in self._shapes().items()):
            return "of another --max_token_length"
        if not job.items:
            return "of a caption that is not known"
        if self._weighs and any(map(has_weights, texts)):
            return _OTHER_WEIGHTS
        caption_file = self._caption_file(job)
        is_older = caption_file is not None and os.path.getmtime(job.path) < os.path.getmtime(caption_file)
        own = self._dataset.encoded_items[job.items[0]].caption
        return "of a caption that changed" if is_older or texts != (own,) else None

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of outputs, found by encoding an empty caption the first time they are asked for."""
        with self._lock:
            if self._known_shapes is None:
                _, sample = next(self.encoder.encode([""]))
                packed = self.encoder.family.text_cache.pack(sample)
                self._known_shapes = {name: array.shape for name, array in packed.items()}
        return self._known_shapes


class _CheckerOfStamps(_Checker):
    """Decides without the text encoders; what it accepts unseen is not remembered."""

    def _accept(self, job: _Job, status: os.stat_result, texts: tuple[str, ...]) -> None:
        pass

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {}


def _all_finite(arrays: Mapping[str, np.ndarray[Any, Any]], names: frozenset[str]) -> bool:
    return all(arrays[name].dtype.kind in "fiub" and np.isfinite(arrays[name]).all() for name in names)
