"""Which cached latents are still right."""

import hashlib
import os
from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from library.dataset.cache_stamps import STAMP_FORMAT, Stamp, is_same_source, read_stamps
from library.dataset.cached import LatentFiles, size_suffix
from library.dataset.file_notes import FileNotes
from library.dataset.images import is_transparent
from library.dataset.items import Item
from library.dataset.latent_encoder import LatentEncoder, LatentJob
from library.files.npz import Arrays, read_npz
from library.models.family import Family
from library.options.errors import UserError

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

_POSTERIORS = {False: "latents_posterior", True: "latents_flipped_posterior"}


@dataclass(frozen=True)
class LatentVerdict:
    """Whether an entry is kept."""

    reason: str | None = None
    """Why the entry has to be made; None keeps it."""
    is_foreign: bool = False
    """Whether it is from another program."""


class LatentChecker:
    """Decides whether files have what jobs would make.

    Args:
        files: where they are.
        family: of the VAE.
        encoder: would make what is missing.
        trust_existing: do not look into files that exist.
    """

    def __init__(self, files: LatentFiles, family: Family, encoder: LatentEncoder, *, trust_existing: bool) -> None:
        self.files = files
        self.notes = FileNotes()
        """What was found out and is to be saved for the next start."""
        self._trust_existing = trust_existing
        dtype = str(encoder.dtype).removeprefix("torch.")
        self._common: Stamp = {"format": STAMP_FORMAT, "vae": family.fingerprint("vae"), "dtype": dtype}

    def stamp(self, job: LatentJob) -> Stamp:
        """Return what is noted in the file, but for the source's time and content."""
        geometry = job.item.geometry
        return self._common | {
            "bucket": list(geometry.bucket),
            "resized": list(geometry.resized),
            "crop": list(geometry.crop),
            "interpolation": job.interpolation,
            "orientation": job.item.orientation,
            "transparency": ("masked" if job.masked else "white") if job.item.has_alpha else None,
        }

    def verdict(self, job: LatentJob) -> LatentVerdict:
        """Look into the file of a job."""
        path = self.files.path(job.item)
        if not os.path.exists(path):
            return LatentVerdict("new")
        if self._trust_existing:
            return LatentVerdict()
        bucket, status = list(job.item.geometry.bucket), os.stat(path)
        noted = self.notes.texts(path, status)  # only of files of other programs
        if noted and self._question(job) in noted:
            return LatentVerdict(is_foreign=True)
        try:
            stamps = read_stamps(path, (size_suffix(self.files.shape(job.item)), ""))
            stamp = next((stamp for stamp in stamps if stamp and stamp.get("bucket") == bucket), None)
            if stamp:
                return LatentVerdict(self._difference(stamp, job))
            verdict = self._foreign(read_npz(path, keys=self._compared(job)), job)
            if verdict.is_foreign:
                self.notes.add(path, status, self._question(job))
            return verdict
        except (UserError, TypeError, ValueError):  # unreadable, or arrays of texts where numbers belong
            return LatentVerdict("damaged")

    def _difference(self, stamp: Stamp, job: LatentJob) -> str | None:
        wanted = self.stamp(job)
        reason = next((_REASONS[part] for part in _REASONS if stamp.get(part) != wanted[part]), None)
        reason = reason or self._missing(stamp["checksums"], job)
        return reason or (
            None if is_same_source(stamp.get("source"), _real_path(job.item), self.notes) else "of an image that changed"
        )

    def _missing(self, names: Container[str], job: LatentJob) -> str | None:
        """Say what an entry with arrays of these names lacks."""
        if job.mirrored and "latents_flipped" not in names:
            return "not mirrored yet"
        if job.masked and job.item.has_alpha and "alpha_mask" not in names:
            return "without a mask yet"
        return None if all(name in names for name in self._posteriors(job)) else "without its posterior yet"

    def _posteriors(self, job: LatentJob) -> list[str]:
        return [_POSTERIORS[flipped] for flipped in {False, job.mirrored}] if self.files.posterior else []

    def _compared(self, job: LatentJob) -> set[str]:
        """Return the names of what has to be read of a file of another program; all the rest of it stays unread."""
        names = {"latents", "original_size", "crop_ltrb", *self._posteriors(job)}
        names |= {"latents_flipped"} if job.mirrored else set()
        names |= {"alpha_mask"} if job.masked and job.item.has_alpha else set()
        return names | {name + size_suffix(self.files.shape(job.item)) for name in names}

    def _question(self, job: LatentJob) -> str:
        """Return all that the judgement on a file of another program depends on, but for the file."""
        image = os.stat(job.item.path)
        wanted = (
            self.stamp(job), job.item.geometry, job.crop_ltrb, job.mirrored, self.files.posterior, job.item.size,
            image.st_size, image.st_mtime_ns,
        )  # fmt: skip
        return hashlib.sha256(repr(wanted).encode()).hexdigest()

    def _foreign(self, arrays: Arrays, job: LatentJob) -> LatentVerdict:
        """Judge a file of another program, which says nothing of where its latents are from.

        It sets no image upright, and keeps what hides under transparent parts.
        """
        item = job.item
        entry = self.files.pick(arrays, self.files.shape(item))
        if entry is None or entry.get("original_size", np.zeros(0)).tolist() != list(item.size):
            return LatentVerdict("of another size")
        crop = entry.get("crop_ltrb", np.zeros(0))
        if crop.shape != (4,) or not np.allclose(crop, item.geometry.crop_ltrb, atol=0.01):
            return LatentVerdict("of another size")
        if item.orientation != 1:
            return LatentVerdict("turned in another way")
        missing = self._missing(entry, job)
        if missing:
            return LatentVerdict(missing)
        if job.masked and item.has_alpha and entry["alpha_mask"].shape != item.geometry.bucket[::-1]:
            return LatentVerdict("without a mask yet")
        latents = [entry[name] for name in ("latents", "latents_flipped") if name in entry]
        if any(each.dtype.kind != "f" or each.shape != latents[0].shape for each in latents):
            return LatentVerdict("damaged")
        if not all(np.isfinite(each).all() for each in latents):
            return LatentVerdict("not finite")
        if os.path.getmtime(self.files.path(item)) < os.path.getmtime(item.path):
            return LatentVerdict("of an image that changed")
        if not job.masked and item.has_alpha and is_transparent(item.path):  # last, since it decodes the image
            return LatentVerdict("transparent in another way")
        return LatentVerdict(is_foreign=True)


def _real_path(item: Item) -> str:
    """Return the file of an item, the same from wherever it is seen."""
    return os.path.join(os.path.dirname(item.cache_stem), os.path.basename(item.path))
