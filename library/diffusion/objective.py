"""The training objective: from latents to noisy latents, from a prediction to a weighted loss per image.

`Objective` is what the training loop knows of it, `DdpmObjective` that of epsilon and v-prediction models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from library.diffusion.losses import ELEMENT_LOSSES, HUBER_SCHEDULES, apply_mask, timestep_weights
from library.diffusion.noise import describe_noise, draw, shape_noise, timestep_range
from library.diffusion.schedule import NoiseSchedule, per_image
from library.options.groups.loss import LossOptions
from library.options.groups.noise import NoiseOptions


@dataclass(frozen=True)
class NoisySample:
    """B noisy images and what made them, all on one device."""

    noisy: Tensor
    """(B, C, h, w) float32, the input of the denoiser."""
    noise: Tensor
    """(B, C, h, w) float32, without the input perturbation."""
    timesteps: Tensor
    """(B,) int64."""


PredictionKind = Literal["epsilon", "v"]
"""What a denoiser predicts, as files say it: the noise, or the velocity."""


class Objective(Protocol):
    """Noise process, target and loss of one family, all decided before the first step; see `DdpmObjective` for the shapes."""

    @property
    def prediction(self) -> PredictionKind:
        """What the denoiser learns to predict."""

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether it is trained down to pure noise."""

    @property
    def trained_timesteps(self) -> tuple[int, int]:
        """The first timestep that is trained and the one after the last; an empty range trains its end alone."""

    def sample(self, latents: Tensor, seeds: Sequence[int], timestep: int | None = None) -> NoisySample:
        """Draw noise and timesteps, each image's by its own seed, and mix them with the latents."""

    def target(self, sample: NoisySample, latents: Tensor) -> Tensor:
        """Return what the model should predict."""

    def weighted(
        self, prediction: Tensor, target: Tensor, timesteps: Tensor, loss_weights: Tensor, masks: Tensor | None = None
    ) -> Tensor:
        """Return the weighted loss of each image, (B,) float32; its mean is what is minimised."""

    def describe(self) -> list[str]:
        """Say what is trained for, one line per choice that is on, for the head of a run."""


class DdpmObjective:
    """Noise process, target and loss of epsilon and v-prediction models; every choice is made here, none in a step.

    Nothing waits for the device: tables live where `schedule` lives, and draws are copied there without waiting.

    Args:
        schedule: the noise schedule, on the device that trains.
        v_parameterization: train on the velocity instead of the noise.
        noise: noise and timestep options.
        loss: loss options.

    Raises:
        UsageError: if the timestep bounds leave the schedule.
    """

    def __init__(self, schedule: NoiseSchedule, v_parameterization: bool, noise: NoiseOptions, loss: LossOptions) -> None:
        self.trained_timesteps = timestep_range(noise)
        self.schedule = schedule
        self.prediction: PredictionKind = "v" if v_parameterization else "epsilon"
        self.zero_terminal_snr = noise.zero_terminal_snr
        self.noise_options = noise
        self.loss_options = loss
        self.element_loss = ELEMENT_LOSSES[loss.loss_type]
        self.terms = timestep_weights(schedule, loss, v_parameterization)
        self._weight = torch.ones_like(schedule.snr)
        for term in self.terms:
            self._weight = self._weight * term.table
        self._huber_c = HUBER_SCHEDULES[loss.huber_schedule](schedule, loss.huber_c, loss.huber_scale)

    def sample(self, latents: Tensor, seeds: Sequence[int], timestep: int | None = None) -> NoisySample:
        """Draw noise and timesteps and mix them with the latents.

        Args:
            latents: (B, C, h, w) in model units, on the device of the schedule; noise is made in float32 whatever their dtype.
            seeds: B seeds; an image's draw depends on its own seed alone.
            timestep: of all images in place of those that are drawn; None draws.
        """
        latents = latents.float()
        channels, height, width = latents.shape[1:]
        draws = draw(seeds, (channels, height, width), self.noise_options)
        if timestep is not None:
            draws = replace(draws, timesteps=torch.full_like(draws.timesteps, timestep))
        draws = draws.to(latents.device)
        noise = shape_noise(draws, latents, self.noise_options)
        perturbed = noise if draws.perturbation is None else noise + draws.perturbation
        return NoisySample(self.schedule.add_noise(latents, perturbed, draws.timesteps), noise, draws.timesteps)

    def target(self, sample: NoisySample, latents: Tensor) -> Tensor:
        """Return what the model should predict, (B, C, h, w) float32: the noise, or the velocity."""
        if self.prediction == "epsilon":
            return sample.noise
        return self.schedule.velocity(latents.float(), sample.noise, sample.timesteps)

    def loss(
        self, prediction: Tensor, sample: NoisySample, latents: Tensor, loss_weights: Tensor, masks: Tensor | None = None
    ) -> Tensor:
        """Return the weighted loss of each image, (B,) float32; its mean is what is minimised.

        Element loss → mask → mean over C, h, w → weight of the image → weights of the timestep.

        Args:
            prediction: (B, C, h, w) in any floating dtype.
            sample: as `sample` gave it.
            latents: (B, C, h, w) in model units.
            loss_weights: (B,) float32, weight of each image.
            masks: (B, 1, H, W) in [0, 1], or None.
        """
        target = self.target(sample, latents)
        return self.weighted(prediction, target, sample.timesteps, loss_weights, masks)

    def weighted(
        self, prediction: Tensor, target: Tensor, timesteps: Tensor, loss_weights: Tensor, masks: Tensor | None = None
    ) -> Tensor:
        """Return the weighted loss of each image, (B,) float32, against a given target; arguments as in `loss`."""
        elements = self.element_loss(prediction, target, per_image(self._huber_c, timesteps))
        if masks is not None:
            elements = apply_mask(elements, masks, normalize=self.loss_options.masked_loss_normalize)
        return elements.mean(dim=(1, 2, 3)) * loss_weights * self._weight[timesteps]

    def describe(self) -> list[str]:
        """Say what is trained for, one line per choice that is on, for the head of a run."""
        loss = self.loss_options
        has_c = loss.loss_type in ("huber", "smooth_l1")
        shape = f", c {loss.huber_c} by the {loss.huber_schedule} schedule" if has_c else ""
        lines = [f"target: {'noise' if self.prediction == 'epsilon' else 'velocity'}", f"loss: {loss.loss_type}{shape}"]
        return lines + [term.description for term in self.terms] + describe_noise(self.noise_options)
