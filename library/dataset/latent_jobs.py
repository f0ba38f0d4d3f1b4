"""Which images have to be encoded, and into which files: a few numbers an image, and the rest when it is asked for."""

import hashlib
import os
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import overload

from library.dataset.buckets import true_crop_ltrb
from library.dataset.cached import LatentFiles, size_suffix
from library.dataset.dataset import Dataset
from library.dataset.latent_encoder import LatentJob
from library.options.errors import UserError


class LatentJobs(Sequence[LatentJob]):
    """Jobs that are built when they are asked for: held ready, each would take a kilobyte.

    Args:
        dataset: of the items.
        firsts: number of the first item of each job.
        shared: the numbers of all items, by the first, where there are several.
        file_of: number of each job's file, where they go to files.
        suffixes: what follows the array names of a job in its file, by its first item, where that is not nothing.
    """

    def __init__(
        self,
        dataset: Dataset,
        firsts: Sequence[int],
        shared: Mapping[int, Sequence[int]],
        file_of: Sequence[int] = (),
        suffixes: Mapping[int, str] | None = None,
    ) -> None:
        self._dataset = dataset
        self._items = dataset.encoded_items
        self._firsts = array("q", firsts)
        self._shared = shared
        self._file_of = array("q", file_of)
        self._suffixes = suffixes or {}

    @classmethod
    def of_dataset(cls, dataset: Dataset) -> "LatentJobs":
        """Gather what has to be encoded; items that are the same image at the same geometry share it."""
        known: dict[bytes, int] = {}
        firsts, shared = array("q"), defaultdict[int, list[int]](list)
        for item in dataset.encoded_items:
            has_mask = item.has_alpha and dataset.is_masked(item)
            name = os.path.basename(item.path)  # not the path: two datasets may write one folder in two ways
            recipe = item.cache_stem, name, item.geometry, dataset.interpolation(item), has_mask
            first = known.setdefault(_digest(repr(recipe)), item.number)
            if first == item.number:
                firsts.append(first)
            else:
                shared[first].append(item.number)
        return cls(dataset, firsts, {first: [first, *others] for first, others in shared.items()})

    def in_files(self, files: LatentFiles) -> "LatentJobs":
        """Give each job its place in the files.

        Raises:
            UserError: one image is wanted in two ways at one size.
        """
        numbers: dict[bytes, int] = {}
        file_of, jobs_of, suffixes = array("q"), array("q"), {}  # file of each job; first job of each file
        several: dict[int, list[int]] = {}
        for position, job in enumerate(self):
            path = files.path(job.item)
            file = numbers.setdefault(_digest(path), len(numbers))
            file_of.append(file)
            if file == len(jobs_of):
                jobs_of.append(position)
                continue
            shape = files.shape(job.item)
            jobs = several.setdefault(file, [jobs_of[file]])
            for other in (self[earlier] for earlier in jobs):
                if files.shape(other.item) == shape:
                    raise UserError(_clash(other, job, path))
            jobs.append(position)
            suffixes[job.item.number] = size_suffix(shape)  # the first size has none, so that sd-scripts reads it
        return LatentJobs(self._dataset, self._firsts, self._shared, file_of, suffixes)

    def share(self, process_index: int, num_processes: int) -> "LatentJobs":
        """Return the jobs of a process: files, not entries, are dealt, so that no two processes write the same file."""
        return self.only([position for position, file in enumerate(self._file_of) if file % num_processes == process_index])

    def only(self, positions: Sequence[int]) -> "LatentJobs":
        """Return some of the jobs."""
        firsts, file_of = ([column[position] for position in positions] for column in (self._firsts, self._file_of))
        return LatentJobs(self._dataset, firsts, self._shared, file_of, self._suffixes)

    def suffix(self, job: LatentJob) -> str:
        """Return what follows the array names of a job in its file."""
        return self._suffixes.get(job.item.number, "")

    def __len__(self) -> int:
        return len(self._firsts)

    @overload
    def __getitem__(self, index: int) -> LatentJob: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LatentJob]: ...
    def __getitem__(self, index: int | slice) -> LatentJob | Sequence[LatentJob]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        dataset, first = self._dataset, self._firsts[index]
        items = tuple(self._items[number] for number in self._shared.get(first, (first,)))
        geometry = items[0].geometry
        return LatentJob(
            items,
            dataset.interpolation(items[0]),
            mirrored=any(dataset.is_mirrored(item) for item in items),
            crop_ltrb=true_crop_ltrb(geometry) if dataset.config.true_crop_conditioning else geometry.crop_ltrb,
            masked=any(dataset.is_masked(item) for item in items),
        )


def _digest(text: str) -> bytes:
    """Return what stands for a text of which there may be millions."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


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
