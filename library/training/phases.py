"""What a run does on its device beside training, traced with fake tensors: captions and images encoded, sample images drawn."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from library.generation.request import ImageRequest
from library.memory.trace import WEIGHTS, Peak, StorageCounter
from library.models.caption_encoding import encode_captions
from library.models.family import SizeConditioning, TextCond
from library.training.setting import Setting

TEXTS, LATENTS, STEP, SAMPLES, SAVING = "encoding captions", "encoding images", "training step", "sample images", "saving"
"""The phases of a run, in their order; saving converts one tensor at a time."""
PHASES = (TEXTS, LATENTS, STEP, SAMPLES, SAVING)
DEVICE = torch.device("cpu")
"""What is traced is on: autograd's engine wants streams of any other device, and sizes are the same."""


@torch.no_grad()
def encoding_captions(setting: Setting, dtype: torch.dtype) -> tuple[Peak, TextCond]:
    """Trace a batch of captions that is encoded before training.

    Args:
        setting: of the traced run.
        dtype: of the text encoders.

    Returns:
        The peak, and what comes of the captions.
    """
    encoders = setting.family.load_text_encoders(dtype, DEVICE)
    captions = [""] * setting.options.dataset.train_batch_size
    counter = StorageCounter(DEVICE)
    counter.register(_weights(*encoders), WEIGHTS)
    with counter:
        cond = encode_captions(setting.family, captions, encoders, DEVICE)
    return counter.peak, cond


@torch.no_grad()
def encoding_images(setting: Setting) -> Peak:
    """Trace the largest images that are encoded before training."""
    family, count = setting.family, setting.options.cache.vae_batch_size
    width, height = max((size for _, size in setting.dataset.buckets), key=lambda size: size[0] * size[1])
    vae = family.load_vae(setting.dtypes.vae, DEVICE)
    counter = StorageCounter(DEVICE)
    counter.register(_weights(vae), WEIGHTS)
    with counter:
        noise = torch.empty(count, family.latent_channels, height // family.latent_stride, width // family.latent_stride)
        family.encode_images(vae, torch.empty(count, 3, height, width), noise)
    return counter.peak


@torch.no_grad()
def drawing_samples(
    setting: Setting,
    denoiser: nn.Module,
    vae: nn.Module | None,
    cond: TextCond,
    requests: Sequence[ImageRequest],
    counter: StorageCounter,
) -> Peak:
    """Trace a step of the largest sample image, and its decoding.

    Args:
        setting: of the traced run.
        denoiser: with what is trained.
        vae: where it is on the device anyway; None where it comes for drawing.
        cond: text outputs of one caption, with a batch axis.
        requests: the sample prompts.
        counter: has counted what stays on the device.
    """
    family = setting.family
    largest = max(requests, key=lambda request: request.width * request.height)
    rows = 2 if any(request.uses_guidance for request in requests) else 1
    vae = family.load_vae(setting.dtypes.vae, DEVICE) if vae is None else vae
    counter.register(_weights(vae), WEIGHTS)
    height, width = (side // family.size_multiple * family.size_multiple for side in (largest.height, largest.width))
    side = torch.tensor([[height, width]] * rows)
    autocast: AbstractContextManager[Any] = (
        nullcontext() if setting.autocast_dtype is None else torch.autocast(DEVICE.type, dtype=setting.autocast_dtype)
    )
    with counter:
        latents = torch.empty(rows, family.latent_channels, height // family.latent_stride, width // family.latent_stride)
        text = {name: value[:1].repeat(rows, *[1] * (value.ndim - 1)) for name, value in cond.items()}
        with autocast:
            family.predict(denoiser, latents, torch.ones(rows, dtype=torch.int64), text, SizeConditioning(side, side, side))
        family.decode_latents(vae, latents[:1])
    return counter.peak


def _weights(*modules: nn.Module) -> list[torch.Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
