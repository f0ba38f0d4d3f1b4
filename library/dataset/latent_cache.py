"""Encode every image once: find which latents are cached and still right, and make the others."""

import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from library.dataset.buckets import Geometry
from library.dataset.cache_stamps import (
    STAMP_FORMAT,
    CacheReport,
    Progress,
    Stamp,
    add_stamp,
    counted,
    is_same_source,
    read_stamp,
    source_stamp,
)
from library.dataset.cached import LATENT_NAMES, LatentFiles, LatentsInMemory, size_suffix
from library.dataset.dataset import Dataset
from library.dataset.images import is_transparent, to_mask
from library.dataset.items import Item
from library.dataset.latent_encoder import EncodedImage, LatentEncoder, LatentJob
from library.files.npz import Arrays, read_npz, write_npz
from library.models.family import Family
from library.options.errors import UserError
from library.options.groups.cache import CacheFileOptions

_CHECKING_THREADS = 8


def cache_latents(
    dataset: Dataset,
    family: Family,
    encoder: LatentEncoder,
    options: CacheFileOptions,
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
        files = LatentFiles(family.latent_cache, family.latent_stride)
        own = _share(_disk_jobs(jobs, files), process_index, num_processes)
        _fill_files(own, files, family, encoder, report, options.skip_cache_check, progress)
        dataset.latents = files
    else:
        report.made["kept in memory"] = len(jobs)
        dataset.latents = _in_memory(jobs, encoder, progress)
    return report


@dataclass(frozen=True)
class _DiskJob:
    job: LatentJob
    path: str
    suffix: str
    """What follows the array names in the file: nothing for the first size of an image, so that sd-scripts reads it."""


def _jobs(dataset: Dataset) -> list[LatentJob]:
    """Gather what has to be encoded; items that are the same image at the same geometry share it."""
    by_recipe: dict[tuple[str, Geometry, str | None, bool], list[Item]] = defaultdict(list)
    for item in dataset.encoded_items:
        has_mask = item.has_alpha and dataset.is_masked(item)
        by_recipe[item.cache_stem, item.geometry, dataset.interpolation(item), has_mask].append(item)
    return [
        LatentJob(
            tuple(items),
            recipe[2],
            mirrored=any(dataset.is_mirrored(item) for item in items),
            masked=any(dataset.is_masked(item) for item in items),
        )
        for recipe, items in by_recipe.items()
    ]


def _disk_jobs(jobs: Sequence[LatentJob], files: LatentFiles) -> list[_DiskJob]:
    shapes: dict[str, dict[tuple[int, int], LatentJob]] = defaultdict(dict)
    for job in jobs:
        path, shape = files.path(job.item), files.shape(job.item)
        if shape in shapes[path]:
            raise UserError(
                f"{job.item.path} is resized in two ways to {job.item.geometry.bucket[0]}x{job.item.geometry.bucket[1]}, "
                f"but {path} holds one. Give both datasets the same settings, or use --cache_latents without _to_disk."
            )
        shapes[path][shape] = job
    return [
        _DiskJob(job, path, "" if position == 0 else size_suffix(shape))
        for path, by_shape in shapes.items()
        for position, (shape, job) in enumerate(by_shape.items())
    ]


def _share(jobs: Sequence[_DiskJob], process_index: int, num_processes: int) -> list[_DiskJob]:
    """Deal files, not entries, to the processes: no two of them write the same file."""
    paths = list(dict.fromkeys(job.path for job in jobs))
    own = set(paths[process_index::num_processes])
    return [job for job in jobs if job.path in own]


def _in_memory(jobs: Sequence[LatentJob], encoder: LatentEncoder, progress: Progress | None) -> LatentsInMemory:
    held, masks = {}, {}
    for encoded in counted(encoder.encode(jobs), len(jobs), progress):
        held.update({item.number: (encoded.latents, encoded.mirrored) for item in encoded.job.items})
        if encoded.mask is not None:
            masks.update({item.number: encoded.mask for item in encoded.job.items if item.has_alpha})
    return LatentsInMemory(held, masks)


def _fill_files(
    jobs: Sequence[_DiskJob],
    files: LatentFiles,
    family: Family,
    encoder: LatentEncoder,
    report: CacheReport,
    trust_existing: bool,
    progress: Progress | None,
) -> None:
    checker = _Checker(files, _common_stamp(family, encoder) if jobs else {}, trust_existing)
    with ThreadPoolExecutor(_CHECKING_THREADS) as pool:
        verdicts = list(pool.map(checker.verdict, jobs))
    report.kept = sum(verdict.reason is None for verdict in verdicts)
    report.foreign = sum(verdict.is_foreign for verdict in verdicts)
    stale = {job.job: job for job, verdict in zip(jobs, verdicts, strict=True) if verdict.reason}
    report.made.update(verdict.reason for verdict in verdicts if verdict.reason)
    for encoded in counted(encoder.encode(list(stale)), len(stale), progress):
        _write(stale[encoded.job], encoded, checker.stamp(encoded.job), files)


def _common_stamp(family: Family, encoder: LatentEncoder) -> Stamp:
    return {"format": STAMP_FORMAT, "vae": family.fingerprint("vae"), "dtype": str(encoder.dtype).removeprefix("torch.")}


_REASONS = {
    "format": "in an older form",
    "vae": "of another VAE",
    "dtype": "in another precision",
    "bucket": "of another size",
    "resized": "of another size",
    "crop": "of another size",
    "interpolation": "resized in another way",
    "orientation": "turned in another way",
    "transparency": "transparent in another way",
}
"""By part of the stamp: why an entry is made again, in the order in which the parts are compared."""


@dataclass(frozen=True)
class _Verdict:
    reason: str | None = None
    """Why the entry has to be made; None keeps it."""
    is_foreign: bool = False


@dataclass(frozen=True)
class _Checker:
    """Decides whether the file has what a job would make."""

    files: LatentFiles
    common: Stamp
    trust_existing: bool

    def stamp(self, job: LatentJob) -> Stamp:
        """Return what is noted in the file, but for the source's time and content."""
        geometry = job.item.geometry
        return self.common | {
            "bucket": list(geometry.bucket),
            "resized": list(geometry.resized),
            "crop": list(geometry.crop),
            "interpolation": job.interpolation,
            "orientation": job.item.orientation,
            "transparency": ("masked" if job.masked else "white") if job.item.has_alpha else None,
        }

    def verdict(self, job: _DiskJob) -> _Verdict:
        if not os.path.exists(job.path):
            return _Verdict("new")
        if self.trust_existing:
            return _Verdict()
        bucket = list(job.job.item.geometry.bucket)
        try:
            stamps = [read_stamp(job.path, suffix) for suffix in (size_suffix(self.files.shape(job.job.item)), "")]
            stamp = next((stamp for stamp in stamps if stamp and stamp.get("bucket") == bucket), None)
            return _Verdict(self._difference(stamp, job.job)) if stamp else self._foreign(read_npz(job.path), job)
        except UserError:
            return _Verdict("damaged")

    def _difference(self, stamp: Stamp, job: LatentJob) -> str | None:
        wanted = self.stamp(job)
        reason = next((_REASONS[part] for part in _REASONS if stamp.get(part) != wanted[part]), None)
        if reason is None and job.mirrored and "latents_flipped" not in stamp["checksums"]:
            return "not mirrored yet"
        if reason is None and job.masked and job.item.has_alpha and "alpha_mask" not in stamp["checksums"]:
            return "without a mask yet"
        return reason or (None if is_same_source(stamp.get("source"), job.item.path) else "of an image that changed")

    def _foreign(self, arrays: Arrays, job: _DiskJob) -> _Verdict:
        """Judge a file of another program, which says nothing of where its latents are from.

        It sets no image upright, and keeps what hides under transparent parts.
        """
        item = job.job.item
        entry = self.files.pick(arrays, self.files.shape(item))
        if entry is None or entry.get("original_size", np.zeros(0)).tolist() != list(item.size):
            return _Verdict("of another size")
        crop = entry.get("crop_ltrb", np.zeros(0))
        if crop.shape != (4,) or not np.allclose(crop, item.geometry.crop_ltrb, atol=0.01):
            return _Verdict("of another size")
        if item.orientation != 1:
            return _Verdict("turned in another way")
        if job.job.mirrored and "latents_flipped" not in entry:
            return _Verdict("not mirrored yet")
        if job.job.masked and item.has_alpha and "alpha_mask" not in entry:
            return _Verdict("without a mask yet")
        if not job.job.masked and item.has_alpha and is_transparent(item.path):
            return _Verdict("transparent in another way")
        if not all(np.isfinite(entry[name]).all() for name in ("latents", "latents_flipped") if name in entry):
            return _Verdict("not finite")
        if os.path.getmtime(job.path) < os.path.getmtime(item.path):
            return _Verdict("of an image that changed")
        return _Verdict(is_foreign=True)


def _write(job: _DiskJob, encoded: EncodedImage, stamp: Stamp, files: LatentFiles) -> None:
    """Write one entry; entries of other sizes in the file stay."""
    item = job.job.item
    entry: dict[str, np.ndarray[Any, Any]] = {
        "latents": encoded.latents.numpy(),
        "original_size": np.array(item.size, dtype=np.int64),
        "crop_ltrb": np.array(item.geometry.crop_ltrb, dtype=np.float64),
    }
    if encoded.mirrored is not None:
        entry["latents_flipped"] = encoded.mirrored.numpy()
    if encoded.mask is not None:
        entry["alpha_mask"] = to_mask(encoded.mask.numpy())
    stamped = add_stamp(entry, stamp | {"source": source_stamp(item.path)})
    kept = _other_sizes(job.path, job.suffix, size_suffix(files.shape(item)))
    arrays = kept | {name + job.suffix: array for name, array in stamped.items()}
    write_npz(job.path, arrays, compressed={name for name in arrays if name.startswith("alpha_mask")})


def _other_sizes(path: str, suffix: str, own_size: str) -> Arrays:
    """Return what a file holds of other sizes: names that end in another size, and plain names unless the new entry has these."""
    try:
        arrays = read_npz(path)
    except UserError:
        return {}
    with_size = {name: array for name, array in arrays.items() if _size_of(name) not in ("", own_size)}
    return with_size | ({name: arrays[name] for name in LATENT_NAMES if name in arrays} if suffix else {})


def _size_of(name: str) -> str:
    """Return the size suffix of an array name, or nothing."""
    base = next((known for known in sorted(LATENT_NAMES, key=len, reverse=True) if name.startswith(f"{known}_")), None)
    return name[len(base) :] if base else ""
