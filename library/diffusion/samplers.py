"""Samplers by their sd-scripts names, made of diffusers' schedulers, and noise that belongs to an image rather than to a batch.

`--sampler` of image generation and `--sample_sampler` of training share this table, so a preview is the picture that
`sdxl_gen_img.py` draws from the same prompt, seed and sampler. Predicted latents are never clipped. The names `k_…` are aliases.
"""

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from library.diffusion.schedule import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS, NoiseSchedule
from library.options.errors import UsageError
from library.options.nearest import did_you_mean

PredictionType = Literal["epsilon", "v_prediction"]

_SMALLEST_ALPHA_CUMPROD = 2.0**-24
"""Stands for 0 where a sampler divides by √ᾱ, as diffusers' Euler does: the highest sigma is 4096 instead of infinite."""


@dataclass(frozen=True)
class Sampler:
    """How one sampler is made."""

    title: str
    """What other programs call it."""
    scheduler: str
    """Class of diffusers, or `module:Class`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    rescales_betas: bool = False
    """Whether the class itself makes the terminal SNR zero."""
    has_spacing: bool = True
    """Whether the class lets its timesteps be spaced; those that do not end at the last one anyway."""


_LEADING = {"steps_offset": 1, "timestep_spacing": "leading"}
_LINSPACE = {"steps_offset": 1, "timestep_spacing": "linspace"}

_SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler("DDIM", "DDIMScheduler", _LEADING | {"clip_sample": False}, rescales_betas=True),
    "pndm": Sampler("PNDM", "PNDMScheduler", _LEADING),
    "lms": Sampler("LMS", "library.diffusion.samplers:lms_scheduler", _LINSPACE),
    "euler": Sampler("Euler", "EulerDiscreteScheduler", _LINSPACE, rescales_betas=True),
    "euler_a": Sampler("Euler a", "EulerAncestralDiscreteScheduler", _LINSPACE, rescales_betas=True),
    "heun": Sampler("Heun", "HeunDiscreteScheduler", _LINSPACE),
    "dpm_2": Sampler("DPM2", "KDPM2DiscreteScheduler", _LINSPACE),
    "dpm_2_a": Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler", _LINSPACE),
    "dpmsolver": Sampler(
        "DPM-Solver",
        "DPMSolverMultistepScheduler",
        _LINSPACE | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        rescales_betas=True,
    ),
    "dpmsolver++": Sampler(
        "DPM++ 2M", "DPMSolverMultistepScheduler", _LINSPACE | {"algorithm_type": "dpmsolver++"}, rescales_betas=True
    ),
    "dpmsingle": Sampler("DPM++ 2S", "DPMSolverSinglestepScheduler", has_spacing=False),
}

SAMPLERS: dict[str, Sampler] = _SAMPLERS | {
    f"k_{name}": _SAMPLERS[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")
}
"""Every sampler by its name on the command line."""


def make_sampler(name: str, prediction_type: PredictionType = "epsilon", zero_terminal_snr: bool = False) -> Any:
    """Make a diffusers scheduler with the noise schedule of SDXL.

    Args:
        name: a name of `SAMPLERS`.
        prediction_type: what the model predicts.
        zero_terminal_snr: draw from pure noise, for models trained so: rescaled betas and trailing timesteps.

    Returns:
        A new scheduler; call `set_timesteps`, then `scale_model_input` and `sampler_step` for each of its `timesteps`.

    Raises:
        UsageError: for an unknown name.
    """
    if name not in SAMPLERS:
        raise UsageError([f"There is no sampler {name!r}.{did_you_mean(name, SAMPLERS)} Choose from {', '.join(SAMPLERS)}."])
    sampler = SAMPLERS[name]
    arguments: dict[str, Any] = {
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
        **sampler.arguments,
    }
    if zero_terminal_snr:
        arguments |= {"rescale_betas_zero_snr": True} if sampler.rescales_betas else {"trained_betas": _nearly_zero_snr_betas()}
        arguments |= {"timestep_spacing": "trailing"} if sampler.has_spacing else {}
    return _scheduler_class(sampler.scheduler)(**arguments)


def _scheduler_class(path: str) -> Any:
    if ":" not in path:
        return getattr(importlib.import_module("diffusers"), path)
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def _nearly_zero_snr_betas() -> "np.ndarray[Any, np.dtype[np.float32]]":
    schedule = NoiseSchedule.make(zero_terminal_snr=True)
    betas = schedule.betas.clone()
    betas[-1] = 1 - _SMALLEST_ALPHA_CUMPROD / schedule.alphas_cumprod[-2]
    return betas.numpy()


def lms_scheduler(**arguments: Any) -> Any:
    """Make diffusers' LMS scheduler with its coefficients integrated exactly, which needs no scipy.

    Args:
        **arguments: as for diffusers' `LMSDiscreteScheduler`.
    """
    from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler

    class ExactLMSDiscreteScheduler(LMSDiscreteScheduler):
        def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
            return lms_coefficient(self.sigmas.double().tolist(), order, t, current_order)

    return ExactLMSDiscreteScheduler(**arguments)


def lms_coefficient(sigmas: Sequence[float], order: int, step: int, current: int) -> float:
    """Integrate the Lagrange basis polynomial of derivative `current` from σ[step] to σ[step + 1].

    The linear multistep (Adams–Bashforth) weight on uneven steps, as in Katherine Crowson's k-diffusion.

    Args:
        sigmas: descending noise levels.
        order: number of derivatives used, at most step + 1.
        step: index of the step.
        current: which derivative, 0 being the newest.
    """
    nodes = [sigmas[step - k] for k in range(order)]
    others = [node for k, node in enumerate(nodes) if k != current]
    scale = float(np.prod([nodes[current] - node for node in others]))
    integral = Polynomial.fromroots(others).integ() if others else Polynomial([0.0, 1.0])
    return float(integral(sigmas[step + 1]) - integral(sigmas[step])) / scale


def image_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per image; all noise of an image comes from its own, so a picture does not depend on its batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def start_noise(generators: Sequence[torch.Generator], image_shape: tuple[int, int, int]) -> Tensor:
    """Draw standard normal latents (B, C, h, w), float32 on the CPU; a sampler wants them times its `init_noise_sigma`.

    Args:
        generators: one per image.
        image_shape: (C, h, w) of one image.
    """
    return torch.stack([torch.randn(image_shape, generator=generator) for generator in generators])


def sampler_step(
    scheduler: Any, prediction: Tensor, timestep: Tensor, latents: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """Move latents one step; samplers that add noise draw each image's from its own generator.

    Args:
        scheduler: as `make_sampler` gives it, after `set_timesteps`.
        prediction: (B, C, h, w), guidance applied.
        timestep: one of the scheduler's `timesteps`.
        latents: (B, C, h, w).
        generators: one per image, CPU, the ones `start_noise` drew from.
    """
    accepted = inspect.signature(scheduler.step).parameters
    noise = {"generator": list(generators)} if "generator" in accepted else {}
    moved: Tensor = scheduler.step(prediction, timestep, latents, return_dict=False, **noise)[0]
    return moved
