"""The noise schedule of Stable Diffusion and SDXL as tables over the timestep, and the forward process they define.

Symbols of the papers: ᾱ (`alphas_cumprod`), signal-to-noise ratio SNR = ᾱ / (1 − ᾱ).
Ho et al. 2020, "Denoising Diffusion Probabilistic Models"; Salimans and Ho 2022, "Progressive Distillation"; Lin et al. 2023,
"Common Diffusion Noise Schedules and Sample Steps are Flawed".
"""

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012


def scaled_linear_betas() -> Tensor:
    """Return the 1000 betas of Stable Diffusion, float32: squares of a linear ramp between √0.00085 and √0.012.

    Computed in float32 as the models were trained with it; float64 differs by 2.5e-5 in the SNR at timestep 0.
    """
    return torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float32) ** 2


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that it ends at 0 and begins where it was (Lin et al. 2023, algorithm 1).

    Args:
        betas: (T,) float32.

    Returns:
        (T,) float32; the last beta is exactly 1.
    """
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    alphas_cumprod = root**2
    return 1.0 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


@dataclass(frozen=True)
class NoiseSchedule:
    """Tables over the 1000 training timesteps, each (1000,) float32 and all on one device."""

    betas: Tensor
    alphas_cumprod: Tensor
    snr: Tensor
    """ᾱ/(1 − ᾱ) of the schedule before any rescaling, never 0. Loss weights use it: models of the field with zero terminal SNR
    were tuned so, and the epsilon weights of the rescaled schedule would divide by zero."""

    @classmethod
    def make(cls, *, zero_terminal_snr: bool = False, device: torch.device | str = "cpu") -> "NoiseSchedule":
        """Build the SDXL schedule, computed on the CPU so that every device has the same tables.

        Args:
            zero_terminal_snr: rescale it so that the last timestep is pure noise.
            device: where the tables live.
        """
        betas = scaled_linear_betas()
        plain = torch.cumprod(1.0 - betas, dim=0)
        if zero_terminal_snr:
            betas = rescale_to_zero_terminal_snr(betas)
        return cls(betas, torch.cumprod(1.0 - betas, dim=0), plain / (1.0 - plain)).to(device)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Return the same tables on `device`."""
        return NoiseSchedule(*(getattr(self, field.name).to(device) for field in fields(self)))

    @cached_property
    def sqrt_alphas_cumprod(self) -> Tensor:
        """√ᾱ, the share of the image in the noisy image."""
        return self.alphas_cumprod.sqrt()

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Tensor:
        """√(1 − ᾱ), the share of the noise in the noisy image."""
        return (1.0 - self.alphas_cumprod).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Forward process: √ᾱ·latents + √(1 − ᾱ)·noise (Ho et al. 2020, equation 4).

        Args:
            latents: (B, C, h, w).
            noise: (B, C, h, w).
            timesteps: (B,) int64 in [0, 1000).
        """
        return (
            per_image(self.sqrt_alphas_cumprod, timesteps) * latents
            + per_image(self.sqrt_one_minus_alphas_cumprod, timesteps) * noise
        )

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The v target: √ᾱ·noise − √(1 − ᾱ)·latents (Salimans and Ho 2022, appendix D); shapes as in `add_noise`."""
        return (
            per_image(self.sqrt_alphas_cumprod, timesteps) * noise
            - per_image(self.sqrt_one_minus_alphas_cumprod, timesteps) * latents
        )


def per_image(table: Tensor, timesteps: Tensor) -> Tensor:
    """Look up `table` (1000,) at `timesteps` (B,), shaped (B, 1, 1, 1) to multiply latents; both on the same device."""
    return table[timesteps].view(-1, 1, 1, 1)
