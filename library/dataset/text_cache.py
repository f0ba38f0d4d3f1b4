"""Encode every caption once: find which text outputs are cached and still right, and make the others."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from library.dataset.cache_stamps import STAMP_FORMAT, CacheReport, Stamp, add_stamp, read_stamp
from library.dataset.cached import TextFiles, TextsInMemory
from library.dataset.caption_files import find_caption_file
from library.dataset.dataset import Dataset
from library.dataset.items import Item
from library.files.npz import Arrays, read_npz, write_npz
from library.models.family import Family, TextCond
from library.options.errors import UserError
from library.options.groups.cache import CacheFileOptions

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the number of captions done and their total."""


@dataclass(frozen=True)
class TextEncoder:
    """The text encoders and how they are used.

    Args:
        family: knows how to call them.
        encoders: on their device, in `dtype`.
        device: where they compute.
        dtype: of their weights.
        max_token_length: to which the family cuts and pads captions; part of what makes an entry what it is.
        batch_size: captions per call.
    """

    family: Family
    encoders: Sequence[nn.Module | None]
    device: torch.device
    dtype: torch.dtype
    max_token_length: int
    batch_size: int = 1

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Iterator[tuple[str, TextCond]]:
        """Yield each caption with its outputs, on the CPU, without a batch axis.

        Raises:
            UserError: outputs are not finite.
        """
        for start in range(0, len(captions), self.batch_size):
            group = captions[start : start + self.batch_size]
            tokens = {name: ids.to(self.device) for name, ids in self.family.tokenize(group).items()}
            cond = {name: value.cpu() for name, value in self.family.encode_text(tokens, self.encoders).items()}
            for position, caption in enumerate(group):
                sample = {name: value[position].clone() for name, value in cond.items()}
                if not all(value.isfinite().all() for value in sample.values() if value.is_floating_point()):
                    raise UserError(
                        f"The text encoders give values that are not finite for the caption {caption!r}. "
                        f"They compute in {str(self.dtype).removeprefix('torch.')}; try --mixed_precision bf16 or no."
                    )
                yield caption, sample


def cache_text_outputs(
    dataset: Dataset,
    encoder: TextEncoder,
    options: CacheFileOptions,
    *,
    trust_foreign: bool,
    process_index: int = 0,
    num_processes: int = 1,
    progress: Progress | None = None,
) -> CacheReport:
    """Give the dataset its text outputs; the captions must not vary (`load_dataset_config` sees to that).

    In memory, every process encodes all captions, each text once. On disk, each process checks and encodes its share, and all must
    wait for each other before they read.

    Args:
        dataset: receives the outputs.
        encoder: makes them.
        options: memory or disk, and whether existing files are looked into.
        trust_foreign: use files of other programs. They are right for diffusers folders; for single-file checkpoints sd-scripts
            applies the projection of the pooled output the wrong way round.
        process_index: of this process.
        num_processes: that share the files.
        progress: told of each caption.

    Raises:
        UserError: one image has two captions but one file, outputs are not finite, or the disk is full.
    """
    report = CacheReport("Captions")
    if options.cache_text_encoder_outputs_to_disk:
        files = TextFiles(encoder.family.text_cache)
        jobs = _disk_jobs(dataset, files)[process_index::num_processes]
        _fill_files(jobs, _Checker(dataset, files, encoder, options.skip_cache_check, trust_foreign), report, progress)
        dataset.texts = files
    else:
        captions = list(dict.fromkeys(dataset.fixed_caption(item) for item in dataset.encoded_items))
        report.made["kept in memory"] = len(captions)
        dataset.texts = TextsInMemory(dict(_counted(encoder.encode(captions), len(captions), progress)))
    logger.info("%s", report.sentence())
    return report


@dataclass(frozen=True)
class _Job:
    item: Item
    path: str
    caption: str


def _disk_jobs(dataset: Dataset, files: TextFiles) -> list[_Job]:
    jobs: dict[str, _Job] = {}
    for item in dataset.encoded_items:
        job = _Job(item, files.path(item), dataset.fixed_caption(item))
        other = jobs.setdefault(job.path, job)
        if other.caption != job.caption:
            raise UserError(
                f"{item.path} is used with two captions, {other.caption!r} and {job.caption!r}, but {job.path} holds one. "
                f"Give both datasets the same caption settings, or use --cache_text_encoder_outputs without _to_disk."
            )
    return list(jobs.values())


def _fill_files(jobs: Sequence[_Job], checker: "_Checker", report: CacheReport, progress: Progress | None) -> None:
    stale: dict[str, list[_Job]] = {}
    for job in jobs:
        reason = checker.reason(job)
        if reason is None:
            report.kept += 1
            continue
        report.made[reason] += 1
        stale.setdefault(job.caption, []).append(job)
    for caption, cond in _counted(checker.encoder.encode(list(stale)), len(stale), progress):
        arrays = add_stamp(checker.encoder.family.text_cache.pack(cond), checker.stamp(caption))
        for job in stale[caption]:
            write_npz(job.path, arrays)


def _counted(encoded: Iterator[tuple[str, TextCond]], total: int, progress: Progress | None) -> Iterator[tuple[str, TextCond]]:
    for done, pair in enumerate(encoded, start=1):
        yield pair
        if progress:
            progress(done, total)


_REASONS = {
    "format": "in an older form",
    "text_encoders": "of other text encoders",
    "dtype": "in another precision",
    "max_token_length": "of another --max_token_length",
    "caption": "of a caption that changed",
}
"""By part of the stamp: why an entry is made again, in the order in which the parts are compared."""


class _Checker:
    """Decides whether a file has what would be made."""

    def __init__(self, dataset: Dataset, files: TextFiles, encoder: TextEncoder, trust_existing: bool, trust_foreign: bool) -> None:
        self.encoder = encoder
        self._dataset = dataset
        self._files = files
        self._trust_existing = trust_existing
        self._trust_foreign = trust_foreign
        self._common: Stamp = {
            "format": STAMP_FORMAT,
            "text_encoders": encoder.family.fingerprint("text_encoders"),
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "max_token_length": encoder.max_token_length,
        }

    def stamp(self, caption: str) -> Stamp:
        return self._common | {"caption": caption}

    def reason(self, job: _Job) -> str | None:
        """Return why an entry has to be made; None keeps it."""
        if not os.path.exists(job.path):
            return "new"
        if self._trust_existing:
            return None
        try:
            stamp = read_stamp(job.path)
            return self._foreign(read_npz(job.path), job) if stamp is None else self._difference(stamp, job.caption)
        except UserError:
            return "damaged"

    def _difference(self, stamp: Stamp, caption: str) -> str | None:
        wanted = self.stamp(caption)
        return next((_REASONS[part] for part in _REASONS if stamp.get(part) != wanted[part]), None)

    def _foreign(self, arrays: Arrays, job: _Job) -> str | None:
        """Judge a file of another program: it holds the caption as the file beside the image had it then."""
        required = self._files.spec.required_keys
        if not required <= arrays.keys() or not _all_finite(arrays, required):
            return "damaged"
        if not self._trust_foreign:
            return "from another program, whose pooled output is not right for a single-file checkpoint"
        if any(arrays[name].shape != shape for name, shape in self._shapes.items()):
            return "of another --max_token_length"
        subset = self._dataset.sections[job.item.section].subset(job.item)
        caption_file = find_caption_file(job.item.path, subset.caption_extension)
        is_older = caption_file is not None and os.path.getmtime(job.path) < os.path.getmtime(caption_file)
        return "of a caption that changed" if is_older or job.caption != job.item.caption else None

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of outputs, found by encoding an empty caption the first time they are asked for."""
        _, sample = next(self.encoder.encode([""]))
        return {name: array.shape for name, array in self.encoder.family.text_cache.pack(sample).items()}


def _all_finite(arrays: Mapping[str, np.ndarray[Any, Any]], names: frozenset[str]) -> bool:
    return all(np.isfinite(arrays[name]).all() for name in names if np.issubdtype(arrays[name].dtype, np.floating))
