"""Turn images into latents: decode ahead on other threads while the VAE works."""

import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.dataset.images import load_placed, to_model_range
from library.dataset.items import Item
from library.dataset.plan import posterior_seed
from library.diffusion.posterior import sample_posterior
from library.models.family import Family
from library.options.errors import UserError

_DECODING_THREADS = max(1, min(6, os.cpu_count() or 1))


@dataclass(frozen=True)
class LatentJob:
    """One image at one size."""

    items: tuple[Item, ...]
    """All items it serves; they differ in nothing that matters here."""
    interpolation: str | None
    mirrored: bool
    """Whether the mirrored image is encoded too."""
    crop_ltrb: tuple[float, float, float, float]
    """Noted beside the latents for other programs."""
    masked: bool = False
    """Whether transparency becomes a mask; otherwise transparent parts are white."""

    @property
    def item(self) -> Item:
        """One of the items."""
        return self.items[0]


@dataclass(frozen=True)
class Latents:
    """What the VAE gives for an image, float32 on the CPU, in cache units."""

    sample: Tensor
    """(C, h, w)."""
    posterior: Tensor | None
    """(2C, h, w), the mean in front of the log-variance."""


@dataclass(frozen=True)
class EncodedImage:
    """The latents of a job and its mask, (H, W) bytes."""

    job: LatentJob
    upright: Latents
    mirrored: Latents | None
    mask: Tensor | None = None


@dataclass(frozen=True)
class _Decoded:
    pixels: Tensor
    """(3, H, W) in [-1, 1]."""
    mask: Tensor | None
    """(H, W) bytes."""


@dataclass(frozen=True)
class LatentEncoder:
    """A VAE and how it is used.

    Args:
        family: knows how to call the VAE.
        load_vae: gives the VAE, on `device` and in `dtype`; called when there is something to encode.
        device: where it computes.
        dtype: of its weights; part of what makes a cache entry what it is.
        seed: with the image file's name it decides the posterior sample.
        batch_size: images per call.
        keep_device_memory: leave freed memory with torch as long as the image size stays.
        posterior: give the posterior too.
    """

    family: Family
    load_vae: Callable[[], nn.Module]
    device: torch.device
    dtype: torch.dtype
    seed: int
    batch_size: int = 1
    keep_device_memory: bool = False
    posterior: bool = False

    def encode(self, jobs: Sequence[LatentJob]) -> Iterator[EncodedImage]:
        """Yield the latents of all jobs, in an order that keeps images of a bucket together.

        Raises:
            UserError: an image cannot be read, or its latents are not finite; it is named.
        """
        keys = ((job.item.geometry.bucket, job.item.path, position) for position, job in enumerate(jobs))
        ordered = map(jobs.__getitem__, array("q", (position for _, _, position in sorted(keys))))
        last_bucket = None
        with ThreadPoolExecutor(_DECODING_THREADS) as pool:
            for group, images in _decoded_ahead(pool, _in_groups(ordered, self.batch_size)):
                bucket = group[0].item.geometry.bucket
                if self.device.type == "cuda" and not (self.keep_device_memory and bucket == last_bucket):
                    torch.cuda.empty_cache()
                last_bucket = bucket
                yield from self._encode_group(group, images)

    @torch.no_grad()
    def _encode_group(self, group: Sequence[LatentJob], images: Sequence[_Decoded]) -> list[EncodedImage]:
        pixels = torch.stack([image.pixels for image in images]).to(self.device)
        upright = self._encode_images(group, pixels, flipped=False)
        wanting = [position for position, job in enumerate(group) if job.mirrored]
        mirrored: dict[int, Latents] = {}
        if wanting:
            flipped = self._encode_images([group[i] for i in wanting], pixels[wanting].flip(-1), flipped=True)
            mirrored = dict(zip(wanting, flipped, strict=True))
        return [EncodedImage(job, upright[i], mirrored.get(i), images[i].mask) for i, job in enumerate(group)]

    def _encode_images(self, group: Sequence[LatentJob], pixels: Tensor, *, flipped: bool) -> list[Latents]:
        noise = torch.stack([self._noise(job.item, flipped=flipped) for job in group]).to(self.device)
        posteriors: Sequence[Tensor | None] = [None] * len(group)
        if self.posterior:
            moments = self.family.encode_posterior(self.load_vae(), pixels).float()
            samples = sample_posterior(moments, noise.to(moments)).cpu()
            posteriors = moments.cpu().unbind()
        else:
            samples = self.family.encode_images(self.load_vae(), pixels, noise).float().cpu()
        finite = samples.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            bad = ", ".join(job.item.path for job, is_finite in zip(group, finite.tolist(), strict=True) if not is_finite)
            raise UserError(f"The VAE gives latents that are not finite for {bad}. {self._advice()}")
        pairs = zip(samples, posteriors, strict=True)  # copies, or each would keep the whole group in memory
        return [Latents(sample.clone(), None if posterior is None else posterior.clone()) for sample, posterior in pairs]

    def _advice(self) -> str:
        if self.dtype == torch.float32:
            return "Check these images and the VAE: it may be damaged."
        name = str(self.dtype).removeprefix("torch.")
        return f"It computes in {name}, in which some VAEs overflow. Add --no_half_vae, or give a VAE made for {name} with --vae."

    def _noise(self, item: Item, *, flipped: bool) -> Tensor:
        width, height = item.geometry.bucket
        stride = self.family.latent_stride
        generator = torch.Generator().manual_seed(posterior_seed(self.seed, item.path, flipped=flipped))
        return torch.randn(self.family.latent_channels, height // stride, width // stride, generator=generator)


def _in_groups(jobs: Iterable[LatentJob], batch_size: int) -> Iterator[list[LatentJob]]:
    """Cut jobs, sorted by bucket, into groups of one bucket."""
    group: list[LatentJob] = []
    for job in jobs:
        if group and (len(group) == batch_size or job.item.geometry.bucket != group[0].item.geometry.bucket):
            yield group
            group = []
        group.append(job)
    if group:
        yield group


def _decoded_ahead(pool: ThreadPoolExecutor, groups: Iterator[list[LatentJob]]) -> Iterator[tuple[list[LatentJob], list[_Decoded]]]:
    """Yield each group with its images, always decoding enough further ones to keep all threads busy."""
    waiting: deque[tuple[list[LatentJob], list[Future[_Decoded]]]] = deque()
    try:
        for group in groups:
            waiting.append((group, [pool.submit(_decode, job) for job in group]))
            if sum(len(images) for _, images in waiting) > 2 * _DECODING_THREADS and len(waiting) > 1:
                ready, images = waiting.popleft()
                yield ready, [image.result() for image in images]
        while waiting:
            ready, images = waiting.popleft()
            yield ready, [image.result() for image in images]
    finally:
        for _, images in waiting:
            for image in images:
                image.cancel()


def _decode(job: LatentJob) -> _Decoded:
    item = job.item
    pixels, alpha = load_placed(
        item.path, item.orientation, item.geometry.bucket, item.geometry.placement, job.interpolation, with_mask=job.masked
    )
    return _Decoded(torch.from_numpy(to_model_range(pixels)), None if alpha is None else torch.from_numpy(alpha.copy()))
