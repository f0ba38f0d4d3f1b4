"""The denoiser from its file to the training step: how its weights are held, and what its forward pass keeps where."""

import torch
from torch import nn

from library.memory.host_activations import keep_on_host
from library.models.family import Family
from library.options.groups.precision import StepPrecisionOptions
from library.training.setting import PartDTypes, Setting, Trained


def load_denoiser(setting: Setting, dtypes: PartDTypes) -> nn.Module:
    """Load the denoiser, frozen, and prepare it."""
    denoiser = setting.family.load_denoiser(dtypes.denoiser, setting.accelerator.device, dtypes.hold_denoiser)
    prepare_denoiser(setting.family, denoiser, setting.options.precision, setting.accelerator.device)
    return denoiser


def prepare_denoiser(family: Family, denoiser: nn.Module, precision: StepPrecisionOptions, device: torch.device) -> None:
    """Decide how a denoiser computes, before anything is attached to it.

    Args:
        family: of the denoiser.
        denoiser: with its weights in place.
        precision: says how.
        device: that computes.
    """
    family.set_attention(denoiser, precision.attention)
    if precision.gradient_checkpointing:
        family.enable_gradient_checkpointing(denoiser, precision.checkpoint_fraction)
    if device.type == "cuda":
        denoiser.to(memory_format=torch.channels_last)


def arrange_denoiser(setting: Setting, denoiser: nn.Module, trained: Trained) -> None:
    """Decide how the denoiser runs, now that everything is attached to it."""
    if setting.options.precision.cpu_offload_checkpointing:
        keep_on_host(denoiser, [trained.trainable.module])
