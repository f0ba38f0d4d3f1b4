"""Noise and timesteps of one training step: a function of each image's seed alone.

All numbers are drawn on the CPU, one stream per image, in the order noise, offset, pyramid, timestep, perturbation. The result is
therefore the same on every device, in every batch and on any number of processes.

Shape legend: B images, C latent channels, h and w latent height and width.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from library.diffusion.schedule import NUM_TRAIN_TIMESTEPS
from library.diffusion.transfer import to_device
from library.options.errors import UsageError
from library.options.groups.noise import NoiseOptions


class RandomStream:
    """The random numbers of one image: tensors from a torch CPU generator, plain numbers from Python's.

    Args:
        seed: 0 to 2⁶⁴ − 1. Torch's CPU generator uses the low 32 bits, so well mixed seeds are expected.
    """

    def __init__(self, seed: int) -> None:
        self.tensors = torch.Generator().manual_seed(seed)
        self.numbers = random.Random(seed)

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers, float32."""
        return torch.randn(shape, generator=self.tensors)

    def uniform(self, *shape: int) -> Tensor:
        """Draw numbers of [0, 1), float32."""
        return torch.rand(shape, generator=self.tensors)


@dataclass(frozen=True)
class NoiseDraws:
    """What was drawn for B images, before it meets the latents."""

    gaussian: Tensor
    """(B, C, h, w) standard normal, plus the pyramid where there is one."""
    timesteps: Tensor
    """(B,) int64 in [0, 1000)."""
    offset: Tensor | None = None
    """(B, C, 1, 1) standard normal; None without noise offset."""
    offset_scale: Tensor | None = None
    """(B, 1, 1, 1) or (1, 1, 1, 1), what `offset` is multiplied by before the adaptive part."""
    perturbation: Tensor | None = None
    """(B, C, h, w) already scaled, added to the input and not to the target; None without input perturbation."""

    def to(self, device: torch.device) -> "NoiseDraws":
        """Copy to `device`; copies to a GPU go through pinned memory and do not wait."""

        def move_any(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else to_device(tensor, device)

        return NoiseDraws(
            to_device(self.gaussian, device),
            to_device(self.timesteps, device),
            move_any(self.offset),
            move_any(self.offset_scale),
            move_any(self.perturbation),
        )


def timestep_range(options: NoiseOptions) -> tuple[int, int]:
    """Return the first timestep and the one after the last, [0, 1000) unless options narrow it.

    Raises:
        UsageError: if a bound leaves the 1000 timesteps of the schedule.
    """
    low = 0 if options.min_timestep is None else options.min_timestep
    high = NUM_TRAIN_TIMESTEPS if options.max_timestep is None else options.max_timestep
    last = high - 1 if low < high else high
    if low < 0 or last >= NUM_TRAIN_TIMESTEPS or high < 0:
        allowed = f"Choose 0 <= min_timestep < max_timestep <= {NUM_TRAIN_TIMESTEPS}; --max_timestep itself is not drawn."
        raise UsageError(
            [f"--min_timestep {low} with --max_timestep {high} leaves the timesteps 0 to {NUM_TRAIN_TIMESTEPS - 1}. {allowed}"]
        )
    return low, high


def uniform_timesteps(stream: RandomStream, count: int, low: int, high: int, options: NoiseOptions) -> Tensor:
    """Draw `count` timesteps, int64, each of [low, high) as often as any other; `options` are not used."""
    return torch.randint(low, high, (count,), generator=stream.tensors)


def logit_normal_timesteps(stream: RandomStream, count: int, low: int, high: int, options: NoiseOptions) -> Tensor:
    """Draw `count` timesteps, int64: ⌊low + (high − low)·sigmoid(m + s·z)⌋, z standard normal, m and s mean and deviation.

    Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", section 3.1. The timestep t or one
    below it is drawn with probability Φ((logit((t + 1 − low)/(high − low)) − m)/s).
    """
    shares = torch.sigmoid(options.logit_mean + options.logit_std * stream.normal(count).double())
    return (low + (high - low) * shares).long().clamp(max=high - 1)


TIMESTEP_DISTRIBUTIONS: Mapping[str, Callable[[RandomStream, int, int, int, NoiseOptions], Tensor]] = {
    "uniform": uniform_timesteps,
    "logit_normal": logit_normal_timesteps,
}


def draw_timesteps(stream: RandomStream, count: int, options: NoiseOptions) -> Tensor:
    """Draw `count` timesteps from the range that is trained, int64; with an empty range every one is its end."""
    low, high = timestep_range(options)
    if low >= high:
        return torch.full((count,), high, dtype=torch.int64)
    return TIMESTEP_DISTRIBUTIONS[options.timestep_distribution](stream, count, low, high, options)


def draw_pyramid(stream: RandomStream, shape: tuple[int, int, int, int], iterations: int, discount: float) -> Tensor:
    """Draw multi-resolution noise: Σ discountⁱ · upsample(normal at 1/rⁱ of the size), r uniform in [2, 4).

    The sum ends with the first level that is one latent pixel high or wide.

    Args:
        stream: random numbers.
        shape: (B, C, h, w).
        iterations: most levels to add; level 0 has the full size.
        discount: weight of one level relative to the one before.
    """
    images, channels, height, width = shape
    total = torch.zeros(shape)
    for level in range(iterations):
        ratio = (stream.numbers.random() * 2 + 2) ** level
        small_height, small_width = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = stream.normal(images, channels, small_height, small_width)
        total += F.interpolate(coarse, size=(height, width), mode="bilinear") * discount**level
        if small_height == 1 or small_width == 1:
            break
    return total


def strength(stream: RandomStream, value: float, is_random: bool) -> Tensor:
    """Return `value`, or a uniform share of it when `is_random`, as (1, 1, 1, 1)."""
    return (stream.uniform(1) * value if is_random else torch.tensor([value])).view(1, 1, 1, 1)


def draw_from(stream: RandomStream, shape: tuple[int, int, int, int], options: NoiseOptions) -> NoiseDraws:
    """Draw for all images of `shape` (B, C, h, w) from one stream, strengths shared between them; training calls it with B = 1.

    0 means "off" for the noise offset, the pyramid iterations and the input perturbation.
    """
    gaussian = stream.normal(*shape)
    offset = offset_scale = perturbation = None
    if options.noise_offset:
        offset_scale = strength(stream, options.noise_offset, options.noise_offset_random_strength)
        offset = stream.normal(*shape[:2], 1, 1)
    if options.multires_noise_iterations:
        gaussian = gaussian + draw_pyramid(stream, shape, options.multires_noise_iterations, options.multires_noise_discount)
    timesteps = draw_timesteps(stream, shape[0], options)
    if options.ip_noise_gamma:
        gamma = strength(stream, options.ip_noise_gamma, options.ip_noise_gamma_random_strength)
        perturbation = gamma * stream.normal(*shape)
    return NoiseDraws(gaussian, timesteps, offset, offset_scale, perturbation)


def draw(seeds: Sequence[int], image_shape: tuple[int, int, int], options: NoiseOptions) -> NoiseDraws:
    """Draw for B images, each from its own stream.

    Args:
        seeds: B seeds.
        image_shape: (C, h, w) of one image's latents.
        options: which kinds of noise are on.

    Returns:
        The draws on the CPU, independent of which images share the batch.
    """
    draws = [draw_from(RandomStream(seed), (1, *image_shape), options) for seed in seeds]

    def join(parts: list[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    return NoiseDraws(
        torch.cat([one.gaussian for one in draws]),
        torch.cat([one.timesteps for one in draws]),
        join([one.offset for one in draws]),
        join([one.offset_scale for one in draws]),
        join([one.perturbation for one in draws]),
    )


def offset_amount(scale: Tensor, latents: Tensor, adaptive_noise_scale: float | None) -> Tensor:
    """Return the noise offset of each channel: max(0, scale + a·|mean over h and w of the latents|), or `scale` without an a.

    Args:
        scale: (B, 1, 1, 1) or (1, 1, 1, 1).
        latents: (B, C, h, w) in model units.
        adaptive_noise_scale: a.
    """
    if adaptive_noise_scale is None:
        return scale
    return (scale + adaptive_noise_scale * latents.mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)


def shape_noise(draws: NoiseDraws, latents: Tensor, options: NoiseOptions) -> Tensor:
    """Turn draws into the noise (B, C, h, w) of the target: offset first, then a pyramid's unit deviation.

    Args:
        draws: as `draw` gives them, on the device of `latents`.
        latents: (B, C, h, w) in model units.
        options: the options the draws were made with.
    """
    noise = draws.gaussian
    if draws.offset is not None and draws.offset_scale is not None:
        noise = noise + offset_amount(draws.offset_scale, latents, options.adaptive_noise_scale) * draws.offset
    if options.multires_noise_iterations:
        noise = noise / noise.std(dim=(1, 2, 3), keepdim=True)
    return noise


def describe_noise(options: NoiseOptions) -> list[str]:
    """Name each kind of noise that is on, one line each, for the head of a run."""
    low, high = timestep_range(options)
    normal = f"logit-normal, mean {options.logit_mean:g}, deviation {options.logit_std:g}"
    drawn = normal if options.timestep_distribution == "logit_normal" else "uniform"
    lines = [f"timesteps: {low} to {high - 1}, {drawn}" if low < high else f"timesteps: always {high}"]
    up_to = {False: "", True: "up to "}
    if options.noise_offset:
        adaptive = f", plus {options.adaptive_noise_scale} × |channel mean|" if options.adaptive_noise_scale is not None else ""
        lines.append(f"noise offset: {up_to[options.noise_offset_random_strength]}{options.noise_offset}{adaptive}")
    if options.multires_noise_iterations:
        lines.append(f"pyramid noise: {options.multires_noise_iterations} levels, discount {options.multires_noise_discount}")
    if options.ip_noise_gamma:
        lines.append(f"input perturbation: {up_to[options.ip_noise_gamma_random_strength]}{options.ip_noise_gamma}")
    if options.zero_terminal_snr:
        lines.append("zero terminal SNR: the last timestep is pure noise; loss weights use the schedule before rescaling")
    return lines
