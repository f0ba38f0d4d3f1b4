"""The distribution of latents that a VAE gives for an image, and draws from it."""

from collections.abc import Sequence

import torch
from torch import Tensor

_STREAM = 0x9E3779B97F4A7C15  # keeps the posterior's draws apart from those of the noise made from the same seed


def posterior_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Draw the noise of posterior samples, (B, *shape) float32 on the CPU, each image from its own seed."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed((seed ^ _STREAM) & (2**63 - 1))) for seed in seeds]
    )


def sample_posterior(posterior: Tensor, noise: Tensor) -> Tensor:
    """Return mean + exp(log-variance / 2) · noise.

    Args:
        posterior: (…, 2C, h, w), the mean in front of the log-variance.
        noise: (…, C, h, w) standard normal.
    """
    mean, log_variance = posterior.chunk(2, dim=-3)
    return mean + torch.exp(0.5 * log_variance) * noise
