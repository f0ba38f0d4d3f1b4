"""The training step as the paper writes it: latents, conditioning, noise, prediction, loss.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", algorithm 1, with the conditioning of Podell et al. 2023 (SDXL).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from library.dataset.batch import Batch
from library.diffusion.objective import NoisySample, Objective
from library.diffusion.posterior import posterior_noise
from library.diffusion.transfer import to_device
from library.models.caption_encoding import encode_captions
from library.models.family import Family, SizeConditioning, TextCond
from library.models.prompt_weights import PromptStyle
from library.options.dataset_keys import PRESERVE
from library.options.errors import UserError
from library.training.position import Position

log = logging.getLogger(__name__)


@dataclass
class ModelParts:
    """The model a step runs; kept out of the module tree so that nothing wraps, moves or broadcasts what is not trained."""

    family: Family
    denoiser: nn.Module
    text_encoders: list[nn.Module | None]
    vae: nn.Module | None
    """On the device where images are encoded in the step; else None, or on the CPU for sample images."""
    vae_batch_size: int = 1
    """Images per call of the VAE: its activations are the largest of all at full resolution."""
    caption_style: PromptStyle | None = None
    """How brackets in captions weigh the tokens between them; None reads brackets as text."""


class TrainStep(nn.Module):
    """One micro-batch from data to a weighted loss per image; its forward is what accelerate wraps.

    Args:
        trained: the module that holds every trained parameter (a network of adapters, or the denoiser itself).
        parts: the model, trained or not.
        objective: noise process, target and loss terms.
        train_text: whether gradients flow through the text encoders.
        set_strength: sets how strongly a network acts on the model; None where the model itself is trained.
        masks_from_control: whether control images are masks of the loss (`--masked_loss`).
        see: takes the control images that the model is to follow; None where it follows none.
    """

    def __init__(
        self,
        trained: nn.Module,
        parts: ModelParts,
        objective: Objective,
        *,
        train_text: bool,
        set_strength: Callable[[float], None] | None = None,
        masks_from_control: bool = False,
        see: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.trained = trained
        self.parts = parts  # a dataclass, so that its modules are no children of this one
        self.objective = objective
        self.train_text = train_text
        self.set_strength = set_strength
        self.masks_from_control = masks_from_control
        self.see = see
        self.num_nan_images: Tensor | None = None
        """Images so far whose latents had a NaN, as a scalar on the device; None before the first encoded batch."""
        self.observe: Callable[[Batch, Tensor, Tensor], None] | None = None
        """Receives each batch with its timesteps (B,) and losses (B,), still on the device."""

    def forward(self, batch: Batch) -> Tensor:
        """Return the weighted loss of each image, float32 (B,), for a batch on the denoiser's device."""
        self._act_as(batch)
        latents = self.parts.family.to_model_units(self.cached_or_encoded_latents(batch))
        sample = self.objective.sample(latents, batch.draw_seeds)
        losses = self._losses(batch, latents, self.conditioning(batch), sample)
        if self.observe is not None:
            self.observe(batch, sample.timesteps, losses)
        return losses

    def losses_at(
        self, batch: Batch, timesteps: Sequence[int], seeds: Sequence[Sequence[int]], posterior_seeds: Sequence[int]
    ) -> Tensor:
        """Return the weighted loss of each image at each of some timesteps, float32 (timesteps, B).

        Args:
            batch: on the denoiser's device; its own seeds are not used.
            timesteps: to measure at.
            seeds: of the noise, for each timestep and image.
            posterior_seeds: of the VAE's posterior, for each image.
        """
        batch = replace(batch, draw_seeds=list(posterior_seeds))
        self._act_as(batch)
        latents = self.parts.family.to_model_units(self.cached_or_encoded_latents(batch))
        cond = self.conditioning(batch)
        samples = (self.objective.sample(latents, own, timestep) for timestep, own in zip(timesteps, seeds, strict=True))
        return torch.stack([self._losses(batch, latents, cond, sample) for sample in samples])

    def _losses(self, batch: Batch, latents: Tensor, cond: TextCond, sample: NoisySample) -> Tensor:
        parts = self.parts
        target = self._target(batch, latents, cond, sample)
        prediction = parts.family.predict(parts.denoiser, sample.noisy, sample.timesteps, cond, batch.sizes)
        return self.objective.weighted(prediction, target, sample.timesteps, batch.loss_weights, self._masks(batch))

    def _act_as(self, batch: Batch) -> None:
        """Give a network its strength and control images for a batch, and leave them: checkpointed parts need them in backward too.

        Raises:
            UserError: the batch has no control images, and the network follows some.
        """
        if self.set_strength is not None:
            self.set_strength(batch.network_multiplier)
        if self.see is None:
            return
        if batch.conditioning is None:
            raise UserError(
                "A batch has no control images, which the network is to follow. Add conditioning_images to every batch."
            )
        self.see(batch.conditioning)

    def _masks(self, batch: Batch) -> Tensor | None:
        """Return the masks (B, 1, H, W) in [0, 1] of a batch: the red of its control images, else its alpha channels."""
        if self.masks_from_control and batch.conditioning is not None:
            return (batch.conditioning[:, :1] + 1) / 2
        return None if batch.masks is None else batch.masks[:, None]

    def _target(self, batch: Batch, latents: Tensor, cond: TextCond, sample: NoisySample) -> Tensor:
        """Return what is to be predicted: for images that preserve the model, what it predicts without the network."""
        target = self.objective.target(sample, latents)
        rows = [row for row, attributes in enumerate(batch.custom_attributes) if attributes.get(PRESERVE)]
        if not rows or self.set_strength is None:
            return target
        return target.index_copy(0, *self._prediction_without_network(self.set_strength, batch, rows, cond, sample))

    @torch.no_grad()
    def _prediction_without_network(
        self, set_strength: Callable[[float], None], batch: Batch, rows: Sequence[int], cond: TextCond, sample: NoisySample
    ) -> tuple[Tensor, Tensor]:
        """Return the rows as a tensor, and the unchanged model's predictions for them, float32."""
        parts, sizes = self.parts, batch.sizes
        index = to_device(torch.tensor(rows), sample.noisy.device)
        set_strength(0.0)
        try:
            if self.train_text and batch.text_cond is None:
                cond = self.conditioning(batch)
            own_cond = {name: tensor[index] for name, tensor in cond.items()}
            own_sizes = SizeConditioning(sizes.original_hw[index], sizes.crop_top_left[index], sizes.target_hw[index])
            prediction = parts.family.predict(parts.denoiser, sample.noisy[index], sample.timesteps[index], own_cond, own_sizes)
        finally:
            self._act_as(batch)
            torch.clear_autocast_cache()  # older PyTorch keeps copies of trained weights made here, which have no gradient
        return index, prediction.float()

    @torch.no_grad()
    def cached_or_encoded_latents(self, batch: Batch) -> Tensor:
        """Return latents (B, C, h, w) float32 in cache units; a NaN of the VAE becomes 0 rather than spoil the whole loss."""
        if batch.latents is not None:
            return batch.latents
        family, vae, images = self.parts.family, self.parts.vae, batch.images
        if images is None or vae is None:
            raise RuntimeError("a batch without latents needs images, and the VAE to encode them")
        height, width = images.shape[-2] // family.latent_stride, images.shape[-1] // family.latent_stride
        noise = to_device(posterior_noise(batch.draw_seeds, (family.latent_channels, height, width)), images.device)
        pieces = zip(images.split(self.parts.vae_batch_size), noise.split(self.parts.vae_batch_size), strict=True)
        latents = torch.cat([family.encode_images(vae, *piece) for piece in pieces])
        found = latents.isnan().flatten(1).any(dim=1).sum()
        self.num_nan_images = found if self.num_nan_images is None else self.num_nan_images + found
        return torch.nan_to_num(latents, nan=0.0)

    def conditioning(self, batch: Batch) -> TextCond:
        """Return the cached text outputs, or encode the captions with the loaded encoders."""
        if batch.text_cond is not None:
            return batch.text_cond
        parts = self.parts
        with torch.set_grad_enabled(self.train_text and torch.is_grad_enabled()):
            return encode_captions(
                parts.family, batch.captions, parts.text_encoders, batch.loss_weights.device, parts.caption_style
            )


class NanWatch:
    """The observer that tells of latents that were no numbers, at the end of epochs, where waiting for the device costs nothing."""

    def __init__(self, step: TrainStep) -> None:
        self._step = step
        self._told = 0

    def before_training(self, position: Position) -> None:
        """Nothing has been encoded yet."""

    def after_update(self, position: Position) -> None:
        """The step itself never waits for the count."""

    def after_epoch(self, position: Position) -> None:
        """Warn of images encoded since the last warning."""
        total = 0 if self._step.num_nan_images is None else int(self._step.num_nan_images)
        if total > self._told:
            log.warning(
                "The VAE made values that are not numbers of %d images; they were trained as 0. Add --no_half_vae.",
                total - self._told,
            )
            self._told = total

    def after_training(self, position: Position) -> None:
        """Warn of what the last, incomplete epoch had."""
        self.after_epoch(position)
