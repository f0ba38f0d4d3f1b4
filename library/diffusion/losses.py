"""Element losses and the weights that depend on the timestep, as pure functions and as terms chosen once from options.

Every weight is a table over the 1000 timesteps, so that a step looks weights up and computes none.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from library.diffusion.schedule import NUM_TRAIN_TIMESTEPS, NoiseSchedule
from library.options.groups.loss import LossOptions

MAX_SNR = 1000.0
"""Weights that divide by 1/SNR stop growing here; only timestep 0 of SDXL lies above."""


def l2(prediction: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """d², d = prediction − target; `c` is not used."""
    return (prediction - target) ** 2


def l1(prediction: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """|d|, d = prediction − target; `c` is not used."""
    return (prediction - target).abs()


def huber(prediction: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """Pseudo-Huber loss 2c(√(d² + c²) − c); near d² for small d and near 2c|d| for large.

    Args:
        prediction: (B, C, h, w).
        target: (B, C, h, w).
        c: (B, 1, 1, 1) > 0, where the loss turns from quadratic to linear.
    """
    return 2 * c * (((prediction - target) ** 2 + c**2).sqrt() - c)


def smooth_l1(prediction: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """Pseudo-Huber loss divided by c: 2(√(d² + c²) − c), near 2|d| for large d; arguments as in `huber`."""
    return 2 * (((prediction - target) ** 2 + c**2).sqrt() - c)


ELEMENT_LOSSES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "l2": l2,
    "l1": l1,
    "huber": huber,
    "smooth_l1": smooth_l1,
}


def constant_huber_c(schedule: NoiseSchedule, h: float, k: float) -> Tensor:
    """c(t) = h·k; (1000,)."""
    return torch.full_like(schedule.snr, h * k)


def exponential_huber_c(schedule: NoiseSchedule, h: float, k: float) -> Tensor:
    """c(t) = k·hᵗᐟ¹⁰⁰⁰, from k at timestep 0 towards h·k at the end; (1000,)."""
    timesteps = torch.arange(NUM_TRAIN_TIMESTEPS, device=schedule.snr.device)
    return k * torch.exp(math.log(h) * timesteps / NUM_TRAIN_TIMESTEPS)


def snr_huber_c(schedule: NoiseSchedule, h: float, k: float) -> Tensor:
    """c(t) = (1 − h)/(1 + σ)² + h with σ = √((1 − ᾱ)/ᾱ); `k` is not used; (1000,).

    1/(1 + σ) is written √ᾱ/(√ᾱ + √(1 − ᾱ)), which is also defined where ᾱ is 0.
    """
    signal, noise = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    return (1 - h) * (signal / (signal + noise)) ** 2 + h


HUBER_SCHEDULES: Mapping[str, Callable[[NoiseSchedule, float, float], Tensor]] = {
    "constant": constant_huber_c,
    "exponential": exponential_huber_c,
    "snr": snr_huber_c,
}


def min_snr_weight(snr: Tensor, gamma: float, v_parameterization: bool) -> Tensor:
    """min(SNR, γ)/SNR for epsilon, min(SNR, γ)/(SNR + 1) for v (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR")."""
    return snr.clamp(max=gamma) / (snr + 1 if v_parameterization else snr)


def noise_like_weight(snr: Tensor, value: float, v_parameterization: bool) -> Tensor:
    """S/(S + 1), S = min(SNR, 1000): weighs a v loss as the epsilon loss of the same prediction; `value` is not used."""
    limited = snr.clamp(max=MAX_SNR)
    return limited / (limited + 1)


def velocity_like_weight(snr: Tensor, value: float, v_parameterization: bool) -> Tensor:
    """1 + value·(S + 1)/S, S = min(SNR, 1000): adds a share of the v loss to an epsilon loss."""
    limited = snr.clamp(max=MAX_SNR)
    return 1 + value * (limited + 1) / limited


def debiased_weight(snr: Tensor, value: float, v_parameterization: bool) -> Tensor:
    """1/√S for epsilon, 1/(S + 1) for v, S = min(SNR, 1000) (Yu et al. 2024, "Debias the Training of Diffusion Models")."""
    limited = snr.clamp(max=MAX_SNR)
    return 1 / (limited + 1) if v_parameterization else limited.rsqrt()


@dataclass(frozen=True)
class _WeightRule:
    option: str
    weight: Callable[[Tensor, float, bool], Tensor]
    description: str
    """May name the option's value as {value}."""


_WEIGHT_RULES = (
    _WeightRule("min_snr_gamma", min_snr_weight, "min-SNR weight, gamma {value}"),
    _WeightRule("scale_v_pred_loss_like_noise_pred", noise_like_weight, "v loss scaled like a noise loss"),
    _WeightRule("v_pred_like_loss", velocity_like_weight, "plus {value} × the v loss"),
    _WeightRule("debiased_estimation_loss", debiased_weight, "debiased estimation weight"),
)


@dataclass(frozen=True)
class LossTerm:
    """A factor on the loss of each image."""

    description: str
    """One line for the head of a run."""
    table: Tensor
    """(1000,) float32, the factor at each timestep."""


def timestep_weights(schedule: NoiseSchedule, options: LossOptions, v_parameterization: bool) -> list[LossTerm]:
    """Choose the weights that are on, in the order they multiply; 0 and unset mean off.

    Args:
        schedule: its unrescaled SNR is used, so no weight divides by zero with zero terminal SNR.
        options: the loss options.
        v_parameterization: whether the model predicts v; two weights have another form then.
    """
    return [
        LossTerm(rule.description.format(value=value), rule.weight(schedule.snr, float(value), v_parameterization))
        for rule in _WEIGHT_RULES
        if (value := getattr(options, rule.option))
    ]


def apply_mask(loss: Tensor, mask: Tensor, *, normalize: bool = False) -> Tensor:
    """Multiply an element loss by a mask of the image, resized to the latents by averaging areas.

    The mean that follows divides by all elements, so a small mask gives a small loss, unless it is normalised: then the mean is
    that of the masked elements alone, Σ m·l / Σ m, and 0 where the mask is black everywhere.

    Args:
        loss: (B, C, h, w).
        mask: (B, 1, H, W) in [0, 1].
        normalize: divide by the mean of each image's mask.
    """
    weights = F.interpolate(mask.to(loss), size=loss.shape[-2:], mode="area")
    if normalize:
        weights = weights / weights.mean(dim=(2, 3), keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return loss * weights
