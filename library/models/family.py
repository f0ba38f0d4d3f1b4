"""What the training loop, the caches, sampling and saving know of a model: one object per architecture.

A family hides what differs between SDXL, SD1/2, SD3 and FLUX.1. Conditioning is always a named dict, never a positional list.

Shape legend: B batch, C latent channels, h and w latent height and width, H and W image height and width, n token rows, L tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from library.diffusion.objective import Objective
from library.models.control import ControlNet
from library.models.new_words import NewWord
from library.models.prompt_weights import PromptStyle
from library.models.weights import Hold
from library.options.groups.loss import LossOptions
from library.options.groups.model import ModelOptions
from library.options.groups.noise import NoiseOptions

Tokens = dict[str, Tensor]
"""Token ids by the family's own names; SDXL: `ids1` and `ids2`, int64 (B, n, 77)."""

TextCond = dict[str, Tensor]
"""Encoded text by the family's own names; SDXL: `hidden1` (B, L, 768), `hidden2` (B, L, 1280), `pool2` (B, 1280)."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and how its files are read."""

    path: str
    """A single-file checkpoint or a diffusers folder."""
    vae: str | None = None
    """A VAE that replaces the checkpoint's own; a file or a folder."""
    mmap: bool = True
    """Memory-map safetensors files; False reads them like any file, which helps on some slow and remote file systems."""
    prefer_fp16_variant: bool = False
    """Take the `.fp16.` files of a diffusers folder where there are any."""
    keep_vae_precision: bool = False
    """Take the VAE's plain files all the same, where there are any: it is computed in float32."""
    tile_vae: bool = False
    """Let the VAE work on large images in overlapping tiles."""
    tokenizer_cache_dir: str | None = None
    max_token_length: int = 75
    """Prompt length in tokens without the begin and end tokens: 75, 150 or 225."""


@dataclass(frozen=True)
class SizeConditioning:
    """The sizes SDXL is conditioned on; int64 (B, 2) each, in pixels, height before width and top before left."""

    original_hw: Tensor
    crop_top_left: Tensor
    target_hw: Tensor

    def to(self, device: torch.device) -> "SizeConditioning":
        """Return the same sizes on `device`, copied without waiting."""
        return SizeConditioning(*(t.to(device, non_blocking=True) for t in (self.original_hw, self.crop_top_left, self.target_hw)))


@dataclass
class Components:
    """The parts of a model; one that is not loaded, or was freed, is None."""

    denoiser: nn.Module | None
    vae: nn.Module | None
    text_encoders: list[nn.Module | None]


@dataclass(frozen=True)
class LatentCacheSpec:
    """How this family's latent caches are named on disk: `<stem>_<W>x<H><suffix>`, W and H of four digits."""

    suffix: str


@dataclass(frozen=True)
class TextCacheSpec:
    """How this family's cached text outputs are named and laid out: `<stem><suffix>`, one file per image."""

    suffix: str
    required_keys: frozenset[str]
    pack: Callable[[Mapping[str, Tensor]], dict[str, np.ndarray[Any, Any]]]
    """One sample's `TextCond` (no batch axis) to the arrays of the file; bfloat16 becomes float32."""
    unpack: Callable[[Mapping[str, np.ndarray[Any, Any]]], TextCond]
    """The inverse: arrays of the file to one sample's `TextCond` (no batch axis)."""


class Family(Protocol):
    """One architecture. Everything in and out is unpacked: latents (B, C, h, w), images (B, 3, H, W) in [-1, 1]."""

    @property
    def name(self) -> str:
        """The family's short name, such as `sdxl`."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, C."""

    @property
    def latent_stride(self) -> int:
        """Pixels per latent position, in each direction."""

    @property
    def size_multiple(self) -> int:
        """Image sides must be multiples of this many pixels (SDXL: 32)."""

    @property
    def vae_tile(self) -> int:
        """Side of the VAE's tiles in pixels (SDXL: 1024), where `ModelSource.tile_vae` asks for them."""

    @property
    def denoiser_name(self) -> str:
        """What the denoiser is called in logs and files (SDXL: `unet`)."""

    @property
    def encoder_names(self) -> tuple[str, ...]:
        """Text encoders in their fixed order, as they are named in network files (SDXL: `te1`, `te2`)."""

    @property
    def large_modules(self) -> tuple[str, ...]:
        """The classes of modules that hold nearly all of the model and run one after the other: they can be gathered one by one."""

    @property
    def part_titles(self) -> Mapping[str, str]:
        """What people call the denoiser and the text encoders, by those names (SDXL: `te1` is CLIP-L)."""

    @property
    def latent_cache(self) -> LatentCacheSpec:
        """How latent caches are named."""

    @property
    def text_cache(self) -> TextCacheSpec:
        """How text caches are named and laid out."""

    def load_text_encoders(self, dtype: torch.dtype, device: torch.device, hold: Hold | None = None) -> list[nn.Module]:
        """Load all text encoders, frozen and in evaluation mode; see `load_denoiser`."""

    def load_vae(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Load the VAE (the replacement one where the source names it), frozen and in evaluation mode."""

    def load_denoiser(self, dtype: torch.dtype, device: torch.device, hold: Hold | None = None) -> nn.Module:
        """Load the U-Net or transformer tensor by tensor, frozen and in evaluation mode.

        Args:
            dtype: of the weights.
            device: where they go.
            hold: what layers keep instead of some tensors, such as the same in fewer bits.
        """

    def make_control_net(self, file: str | None, dtype: torch.dtype, device: torch.device) -> ControlNet:
        """Make a ControlNet of the denoiser, trainable and not applied yet.

        Args:
            file: of the one to go on from; None begins with a copy of the denoiser's weights.
            dtype: of its weights.
            device: where they go.

        Raises:
            UserError: the file cannot be read, or is of another model.
        """

    def trusts_foreign_text_caches(self) -> bool:
        """Whether text outputs that sd-scripts cached of this model are those of this model."""

    def fingerprint(self, part: str) -> str:
        """Identify the file behind `part` ("vae" or "text_encoders") for caches: it changes whenever the weights may have."""

    def with_words(self, words: Sequence[NewWord]) -> "Family":
        """Return this family with words besides the vocabulary of its text encoders.

        Raises:
            UserError: one of them, or of the names of its vectors, is in the vocabulary.
        """

    def read_word(self, path: str | Path) -> list[Tensor]:
        """Return the vectors of a learned word for each text encoder, (n, width) float32.

        Raises:
            UserError: the file cannot be read, or is of another kind of model.
        """

    def save_word(
        self, path: str | Path, rows: Sequence[Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
    ) -> None:
        """Write the vectors of a learned word atomically.

        Args:
            path: `.safetensors`, or with any other extension a PyTorch pickle without metadata.
            rows: (n, width) for each text encoder.
            dtype: of the saved vectors; None keeps their own.
            metadata: of a safetensors file.

        Raises:
            UserError: the disk is full or the folder not writable.
        """

    def word_vectors(self, text: str, encoders: Sequence[nn.Module]) -> list[Tensor]:
        """Return the vectors of a text's tokens in each encoder's table, (tokens, width) float32.

        Args:
            text: any; begin and end are no part of it.
            encoders: all of them, as `load_text_encoders` gives them.
        """

    def extend_vocabulary(self, encoders: Sequence[nn.Module], rows: Sequence[Tensor]) -> list[nn.Parameter]:
        """Put the vectors of the new words behind each encoder's table.

        Args:
            encoders: all of them, as `load_text_encoders` gives them.
            rows: for each encoder (R, width), the vectors of all new words in the order of the words.

        Returns:
            The vectors as the encoders hold them, in the type they were given, without gradients.
        """

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Turn B texts into token ids, on the CPU."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, without those of begin and end, and before anything is cut off."""

    def encode_text(self, tokens: Tokens, encoders: Sequence[nn.Module | None]) -> TextCond:
        """Run every encoder that is not None on the device and in the dtype it has; gradients flow where they are enabled."""

    def encode_prompts(self, texts: Sequence[str], encoders: Sequence[nn.Module | None], style: PromptStyle) -> list[TextCond]:
        """Encode the texts of one picture (prompt, negative prompt), weights and all, to the same length.

        Returns:
            One conditioning per text, each with a batch axis of 1.
        """

    def encode_images(self, vae: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
        """Sample the VAE posterior, in cache units (SDXL: unscaled).

        Args:
            vae: as `load_vae` gives it.
            images: (B, 3, H, W) in [-1, 1].
            noise: (B, C, h, w) standard normal draws of the posterior, so that the caller owns the randomness.
        """

    def encode_posterior(self, vae: nn.Module, images: Tensor) -> Tensor:
        """Return what `encode_images` samples from, in cache units: (B, 2C, h, w) float32, the mean in front of the log-variance.

        Args:
            vae: as `load_vae` gives it.
            images: (B, 3, H, W) in [-1, 1].
        """

    def to_model_units(self, latents: Tensor) -> Tensor:
        """Cache units to what the denoiser sees (SDXL: times 0.13025)."""

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Model units to images (B, 3, H, W) in [-1, 1], not clamped."""

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, cond: TextCond, sizes: SizeConditioning | None
    ) -> Tensor:
        """Run the denoiser.

        Args:
            denoiser: as `load_denoiser` gives it.
            noisy: (B, C, h, w), cast to the denoiser's dtype unless autocast does it.
            timesteps: (B,) int64 for DDPM families.
            cond: as `encode_text` gives it, batch B.
            sizes: required for SDXL.

        Returns:
            (B, C, h, w), in the denoiser's output dtype.
        """

    def make_objective(self, model: ModelOptions, noise: NoiseOptions, loss: LossOptions, device: torch.device) -> Objective:
        """Make the noise process, target and loss that this model is trained with, and warn where its files say otherwise.

        Args:
            model: what the denoiser predicts.
            noise: noise and timestep options.
            loss: loss options.
            device: that trains.

        Raises:
            UsageError: the options do not fit this family.
        """

    def skeletons(self) -> dict[str, nn.Module]:
        """Build the parts that networks are made for, by their short names, on the meta device: without values."""

    def with_changes(self, changes: Mapping[str, Mapping[str, Callable[[Tensor], Tensor]]]) -> "Family":
        """Return this family with some of its weights changed whenever they are read; fingerprints change with them.

        Args:
            changes: by part and tensor name of its module, what becomes of a tensor as it lies in the file; the shape stays.
        """

    def without_values(self) -> "Family":
        """Return this family with tensors that have shapes but no values: nothing is read, for tracing under fake tensors."""

    def set_attention(self, denoiser: nn.Module, kind: str) -> None:
        """Choose how the denoiser computes attention: "sdpa", "xformers", "mem_eff_attn" or "plain".

        Raises:
            UserError: the package it needs is not installed.
        """

    def enable_gradient_checkpointing(self, denoiser: nn.Module, fraction: float = 1.0) -> None:
        """Let blocks of the denoiser compute activations again in the backward pass instead of keeping them.

        Args:
            denoiser: as `load_denoiser` gives it.
            fraction: of the blocks, 0 to 1, those first that save most for what they cost.
        """

    def enable_text_checkpointing(self, encoders: Sequence[nn.Module | None]) -> None:
        """Let those encoders that are not None compute activations again too; they are in training mode afterwards."""

    def file_names(self, part: str, module: nn.Module) -> dict[str, str]:
        """Return, for each tensor name of the module of `part` (its short name, such as "unet" or "te1"), its name in files."""

    def text_shapes(self, tokens: int) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of each part of a text's `TextCond` as the denoiser wants it, without the batch axis.

        Args:
            tokens: of the text.
        """

    def blocks(self, denoiser: nn.Module) -> Mapping[str, nn.Module]:
        """Return the modules that hold nearly all of the denoiser, by name, in the order in which its forward pass runs them.

        Each is called once in a forward pass, and none is a part of another.
        """

    def denoiser_blocks(self, denoiser: nn.Module) -> list[list[nn.Parameter]]:
        """Return the denoiser's parameters in the blocks that can have learning rates of their own, in their fixed order."""

    def unused_text_parameters(self, encoder: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of a text encoder that have no influence on what the denoiser sees."""

    def save_model(
        self,
        path: Path,
        layout: str,
        trained: Mapping[str, Mapping[str, Tensor]],
        *,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        v_prediction: bool,
        zero_terminal_snr: bool,
        progress: tuple[int, int] = (0, 0),
    ) -> None:
        """Write a whole model, atomically.

        Everything that was not trained is read from the files again and written as it stands there, its number type included.

        Args:
            path: of the file or folder, which is made or replaced.
            layout: "safetensors", "ckpt", "diffusers" (a folder with .bin files) or "diffusers_safetensors".
            trained: by part ("unet", "te1", "te2") and name in files, the tensors that take the place of those in the files.
            dtype: floating-point tensors are saved as this; None keeps each as it is.
            metadata: written where the layout has room for it.
            v_prediction: whether the denoiser predicts v.
            zero_terminal_snr: whether it was trained down to pure noise.
            progress: epochs and steps trained, for "ckpt".

        Raises:
            UserError: the disk is full or the folder not writable; what stood at `path` before is still whole.
        """

    def network_metadata(self) -> dict[str, str]:
        """The `ss_*` keys of network files that say which models they fit, such as `ss_base_model_version` (`sdxl_base_v1-0`)."""

    def model_spec(self) -> dict[str, str]:
        """The `modelspec` fields of a base model: `architecture` (SDXL: `stable-diffusion-xl-v1-base`) and `implementation`."""
