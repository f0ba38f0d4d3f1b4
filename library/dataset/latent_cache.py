"""Encode every image once: find which latents are cached and still right, and make the others."""

import os
import re
from collections import deque
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from library.dataset.cache_folders import require_writable
from library.dataset.cache_stamps import CacheReport, Progress, Stamp, add_stamp, counted, source_stamp
from library.dataset.cached import LATENT_NAMES, LatentFiles, LatentsInMemory, size_suffix
from library.dataset.dataset import Dataset
from library.dataset.images import to_mask
from library.dataset.latent_check import LatentChecker
from library.dataset.latent_encoder import EncodedImage, LatentEncoder, LatentJob, Latents
from library.dataset.latent_jobs import LatentJobs
from library.files.locks import folder_lock
from library.files.npz import Arrays, read_npz, write_npz
from library.models.family import Family
from library.options.errors import UserError
from library.options.groups.cache import LatentCacheOptions

_CHECKING_THREADS = 8
_CHECKED_AT_ONCE = 1024
"""Files whose verdicts are held at one time: of a million, each would take its part of the memory."""
_WAITING_WRITES = 16
"""Images encoded and not yet on the disk."""


def cache_latents(
    dataset: Dataset,
    family: Family,
    encoder: LatentEncoder,
    options: LatentCacheOptions,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    progress: Progress | None = None,
) -> CacheReport:
    """Give the dataset its latents.

    In memory, every process encodes all images. On disk, each checks and encodes its share of the files, and all must wait for each
    other before they read; entries that are right are kept, and what was written stays if the rest is interrupted.

    Args:
        dataset: receives the latents.
        family: of the VAE.
        encoder: makes them.
        options: memory or disk, and whether existing files are looked into.
        process_index: of this process.
        num_processes: that share the files.
        progress: told of each image.

    Raises:
        UserError: an image cannot be read, its latents are not finite, or the disk is full.
    """
    jobs = LatentJobs.of_dataset(dataset)
    report = CacheReport("Latents")
    if options.cache_latents_to_disk:
        files = LatentFiles(family.latent_cache, family.latent_channels, family.latent_stride, posterior=encoder.posterior)
        own = jobs.in_files(files).share(process_index, num_processes)
        if own:
            checker = LatentChecker(files, family, encoder, trust_existing=options.skip_cache_check)
            _fill_files(own, checker, encoder, report, progress)
        dataset.latents = files
    else:
        report.made["kept in memory"] = len(jobs)
        dataset.latents = _in_memory(jobs, encoder, progress)
    return report


def survey_latents(dataset: Dataset, family: Family, encoder: LatentEncoder, options: LatentCacheOptions) -> CacheReport:
    """Say what `cache_latents` would find on the disk and make, without making it; no model is loaded.

    Raises:
        UserError: one image is wanted in two ways at one size.
    """
    report = CacheReport("Latents")
    files = LatentFiles(family.latent_cache, family.latent_channels, family.latent_stride, posterior=encoder.posterior)
    jobs = LatentJobs.of_dataset(dataset).in_files(files)
    if jobs:
        _stale(jobs, LatentChecker(files, family, encoder, trust_existing=options.skip_cache_check), report)
    return report


def latent_files_to_write(
    dataset: Dataset, family: Family, encoder: LatentEncoder, options: LatentCacheOptions, folders: Container[str]
) -> list[str]:
    """Return the files in some folders that `cache_latents` would write; no model is loaded.

    Raises:
        UserError: one image is wanted in two ways at one size.
    """
    files = LatentFiles(family.latent_cache, family.latent_channels, family.latent_stride, posterior=encoder.posterior)
    jobs = LatentJobs.of_dataset(dataset).in_files(files)
    own = jobs.only([number for number, job in enumerate(jobs) if os.path.dirname(files.path(job.item)) in folders])
    checker = LatentChecker(files, family, encoder, trust_existing=options.skip_cache_check)
    return _paths(_stale(own, checker, CacheReport("Latents")), files)


def _paths(jobs: LatentJobs, files: LatentFiles) -> list[str]:
    return list(dict.fromkeys(files.path(job.item) for job in jobs))


def _in_memory(jobs: LatentJobs, encoder: LatentEncoder, progress: Progress | None) -> LatentsInMemory:
    held, masks = {}, {}
    for encoded in counted(encoder.encode(jobs), len(jobs), progress):
        pair = (_held(encoded.upright), None if encoded.mirrored is None else _held(encoded.mirrored))
        held.update({item.number: pair for item in encoded.job.items})
        if encoded.mask is not None:
            masks.update({item.number: encoded.mask for item in encoded.job.items if item.has_alpha})
    return LatentsInMemory(held, masks, posterior=encoder.posterior)


def _held(latents: Latents) -> Tensor:
    return latents.sample if latents.posterior is None else latents.posterior


def _fill_files(
    jobs: LatentJobs, checker: LatentChecker, encoder: LatentEncoder, report: CacheReport, progress: Progress | None
) -> None:
    stale = _stale(jobs, checker, report)
    require_writable("latents", _paths(stale, checker.files))
    for _ in counted(_written(encoder.encode(stale), stale, checker), len(stale), progress):
        pass


def _stale(jobs: LatentJobs, checker: LatentChecker, report: CacheReport) -> LatentJobs:
    """Look into all files, note what is there, and return the jobs whose entries have to be made."""
    stale: list[int] = []
    with ThreadPoolExecutor(_CHECKING_THREADS) as pool:
        for start in range(0, len(jobs), _CHECKED_AT_ONCE):
            chunk = range(start, min(start + _CHECKED_AT_ONCE, len(jobs)))
            for position, verdict in zip(chunk, pool.map(lambda each: checker.verdict(jobs[each]), chunk), strict=True):
                report.foreign += verdict.is_foreign
                if verdict.reason is None:
                    report.kept += 1
                else:
                    report.made[verdict.reason] += 1
                    stale.append(position)
            checker.notes.save()
    return jobs.only(stale)


def _written(encoded: Iterator[EncodedImage], jobs: LatentJobs, checker: LatentChecker) -> Iterator[LatentJob]:
    """Write entries while the next ones are encoded; yield each job when it is on the disk, in their order."""
    with ThreadPoolExecutor(1) as writer:
        waiting: deque[tuple[LatentJob, Future[None]]] = deque()
        for image in encoded:
            waiting.append(
                (image.job, writer.submit(_write, jobs.suffix(image.job), image, checker.stamp(image.job), checker.files))
            )
            while waiting and (waiting[0][1].done() or len(waiting) > _WAITING_WRITES):
                job, write = waiting.popleft()
                write.result()
                yield job
        for job, write in waiting:
            write.result()
            yield job


def _write(suffix: str, encoded: EncodedImage, stamp: Stamp, files: LatentFiles) -> None:
    """Write one entry; entries of other sizes in the file stay.

    Args:
        suffix: what follows its array names.
        encoded: the latents.
        stamp: what they are made from, but for the source.
        files: where they belong.
    """
    item = encoded.job.item
    path = files.path(item)
    entry: dict[str, np.ndarray[Any, Any]] = {
        "original_size": np.array(item.size, dtype=np.int64),
        "crop_ltrb": np.array(encoded.job.crop_ltrb, dtype=np.float64),
    }
    for name, latents in (("latents", encoded.upright), ("latents_flipped", encoded.mirrored)):
        if latents is not None:
            entry[name] = latents.sample.numpy()
        if latents is not None and latents.posterior is not None:
            entry[f"{name}_posterior"] = latents.posterior.numpy()
    if encoded.mask is not None:
        entry["alpha_mask"] = to_mask(encoded.mask.numpy())
    stamped = add_stamp(entry, stamp | {"source": source_stamp(item.path)})
    with folder_lock(os.path.dirname(path)):
        kept = _other_sizes(path, suffix, size_suffix(files.shape(item)))
        arrays = kept | {name + suffix: array for name, array in stamped.items()}
        write_npz(path, arrays, compressed={name for name in arrays if name.startswith("alpha_mask")})


def _other_sizes(path: str, suffix: str, own_size: str) -> Arrays:
    """Return what a file holds of other sizes.

    What stands there without a size gives way to a new entry without one: it goes under its size, where it is still found.
    """
    try:
        arrays = read_npz(path)
    except UserError:
        return {}
    latents = arrays.get("latents", np.zeros(0))
    plain_size = size_suffix(latents.shape[-2:]) if latents.ndim == 3 else ""
    kept = {name: array for name, array in arrays.items() if _size_of(name) not in ("", own_size)}
    if plain_size in ("", own_size):
        return kept
    return kept | {name + ("" if suffix else plain_size): arrays[name] for name in LATENT_NAMES if name in arrays}


def _size_of(name: str) -> str:
    """Return the size suffix of an array name, or nothing."""
    found = re.search(r"_\d+x\d+$", name)
    return found.group() if found else ""
