"""Encode every image once: find which latents are cached and still right, and make the others."""

import os
import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from library.dataset.buckets import Geometry, true_crop_ltrb
from library.dataset.cache_stamps import CacheReport, Progress, Stamp, add_stamp, counted, source_stamp
from library.dataset.cached import LATENT_NAMES, LatentFiles, LatentsInMemory, size_suffix
from library.dataset.dataset import Dataset
from library.dataset.images import to_mask
from library.dataset.items import Item
from library.dataset.latent_check import LatentChecker
from library.dataset.latent_encoder import EncodedImage, LatentEncoder, LatentJob, Latents
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
    jobs = _jobs(dataset)
    report = CacheReport("Latents")
    if options.cache_latents_to_disk:
        files = LatentFiles(family.latent_cache, family.latent_channels, family.latent_stride, posterior=encoder.posterior)
        own = _share(_disk_jobs(jobs, files), process_index, num_processes)
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
    jobs = _disk_jobs(_jobs(dataset), files)
    if jobs:
        _stale(jobs, LatentChecker(files, family, encoder, trust_existing=options.skip_cache_check), report)
    return report


@dataclass(frozen=True)
class _DiskJob:
    job: LatentJob
    path: str
    suffix: str
    """What follows the array names in the file: nothing for the first size of an image, so that sd-scripts reads it."""


def _jobs(dataset: Dataset) -> list[LatentJob]:
    """Gather what has to be encoded; items that are the same image at the same geometry share it."""
    by_recipe: dict[tuple[str, str, Geometry, str | None, bool], list[Item]] = defaultdict(list)
    for item in dataset.encoded_items:
        has_mask = item.has_alpha and dataset.is_masked(item)
        name = os.path.basename(item.path)  # not the path: two datasets may write one folder in two ways
        by_recipe[item.cache_stem, name, item.geometry, dataset.interpolation(item), has_mask].append(item)
    return [
        LatentJob(
            tuple(items),
            interpolation,
            mirrored=any(dataset.is_mirrored(item) for item in items),
            crop_ltrb=true_crop_ltrb(geometry) if dataset.config.true_crop_conditioning else geometry.crop_ltrb,
            masked=any(dataset.is_masked(item) for item in items),
        )
        for (_, _, geometry, interpolation, _), items in by_recipe.items()
    ]


def _disk_jobs(jobs: Sequence[LatentJob], files: LatentFiles) -> list[_DiskJob]:
    shapes: dict[str, dict[tuple[int, int], LatentJob]] = defaultdict(dict)
    for job in jobs:
        path, shape = files.path(job.item), files.shape(job.item)
        if shape in shapes[path]:
            raise UserError(_clash(shapes[path][shape], job, path))
        shapes[path][shape] = job
    return [
        _DiskJob(job, path, "" if position == 0 else size_suffix(shape))
        for path, by_shape in shapes.items()
        for position, (shape, job) in enumerate(by_shape.items())
    ]


def _clash(one: LatentJob, other: LatentJob, path: str) -> str:
    """Say why two jobs cannot share an entry."""
    item = other.item
    if os.path.basename(one.item.path) != os.path.basename(item.path):
        return f"{one.item.path} and {item.path} would both be cached in {path}. Give one of them another name."
    size = "{}x{}".format(*item.geometry.bucket)
    if (one.item.geometry, one.interpolation) != (item.geometry, other.interpolation):
        what = f"is resized in two ways to {size}"
    else:
        what = f"is wanted at {size} with its transparency as a mask and with white in its place (alpha_mask)"
    advice = "Give both datasets the same settings, or use --cache_latents without _to_disk."
    return f"{item.path} {what}, but {path} holds one. {advice}"


def _share(jobs: Sequence[_DiskJob], process_index: int, num_processes: int) -> list[_DiskJob]:
    """Deal files, not entries, to the processes: no two of them write the same file."""
    paths = list(dict.fromkeys(job.path for job in jobs))
    own = set(paths[process_index::num_processes])
    return [job for job in jobs if job.path in own]


def _in_memory(jobs: Sequence[LatentJob], encoder: LatentEncoder, progress: Progress | None) -> LatentsInMemory:
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
    jobs: Sequence[_DiskJob], checker: LatentChecker, encoder: LatentEncoder, report: CacheReport, progress: Progress | None
) -> None:
    stale = _stale(jobs, checker, report)
    for _ in counted(_written(encoder.encode(list(stale)), stale, checker), len(stale), progress):
        pass


def _stale(jobs: Sequence[_DiskJob], checker: LatentChecker, report: CacheReport) -> dict[LatentJob, _DiskJob]:
    """Look into all files, note what is there, and return the jobs whose entries have to be made."""
    stale: dict[LatentJob, _DiskJob] = {}
    with ThreadPoolExecutor(_CHECKING_THREADS) as pool:
        for start in range(0, len(jobs), _CHECKED_AT_ONCE):
            chunk = jobs[start : start + _CHECKED_AT_ONCE]
            for job, verdict in zip(chunk, pool.map(lambda each: checker.verdict(each.job), chunk), strict=True):
                report.foreign += verdict.is_foreign
                if verdict.reason is None:
                    report.kept += 1
                else:
                    report.made[verdict.reason] += 1
                    stale[job.job] = job
            checker.notes.save()
    return stale


def _written(encoded: Iterator[EncodedImage], jobs: Mapping[LatentJob, _DiskJob], checker: LatentChecker) -> Iterator[LatentJob]:
    """Write entries while the next ones are encoded; yield each job when it is on the disk, in their order."""
    with ThreadPoolExecutor(1) as writer:
        waiting: deque[tuple[LatentJob, Future[None]]] = deque()
        for image in encoded:
            waiting.append((image.job, writer.submit(_write, jobs[image.job], image, checker.stamp(image.job), checker.files)))
            while waiting and (waiting[0][1].done() or len(waiting) > _WAITING_WRITES):
                job, write = waiting.popleft()
                write.result()
                yield job
        for job, write in waiting:
            write.result()
            yield job


def _write(job: _DiskJob, encoded: EncodedImage, stamp: Stamp, files: LatentFiles) -> None:
    """Write one entry; entries of other sizes in the file stay."""
    item = job.job.item
    entry: dict[str, np.ndarray[Any, Any]] = {
        "original_size": np.array(item.size, dtype=np.int64),
        "crop_ltrb": np.array(job.job.crop_ltrb, dtype=np.float64),
    }
    for name, latents in (("latents", encoded.upright), ("latents_flipped", encoded.mirrored)):
        if latents is not None:
            entry[name] = latents.sample.numpy()
        if latents is not None and latents.posterior is not None:
            entry[f"{name}_posterior"] = latents.posterior.numpy()
    if encoded.mask is not None:
        entry["alpha_mask"] = to_mask(encoded.mask.numpy())
    stamped = add_stamp(entry, stamp | {"source": source_stamp(item.path)})
    with folder_lock(os.path.dirname(job.path)):
        kept = _other_sizes(job.path, job.suffix, size_suffix(files.shape(item)))
        arrays = kept | {name + job.suffix: array for name, array in stamped.items()}
        write_npz(job.path, arrays, compressed={name for name in arrays if name.startswith("alpha_mask")})


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
