"""The denoiser from its file to the training step: how its weights are held, and what its forward pass keeps where."""

import torch
from torch import nn

from library.memory.host_activations import keep_on_host
from library.training.setting import PartDTypes, Setting, Trained


def load_denoiser(setting: Setting, dtypes: PartDTypes) -> nn.Module:
    """Load the denoiser, frozen, with the attention that was asked for."""
    denoiser = setting.family.load_denoiser(dtypes.denoiser, setting.accelerator.device, dtypes.hold_denoiser)
    setting.family.set_attention(denoiser, setting.options.precision.attention)
    if setting.accelerator.device.type == "cuda":
        denoiser.to(memory_format=torch.channels_last)
    return denoiser


def arrange_denoiser(setting: Setting, denoiser: nn.Module, trained: Trained) -> None:
    """Decide how the denoiser runs, now that everything is attached to it."""
    if setting.options.precision.cpu_offload_checkpointing:
        keep_on_host(denoiser, [trained.trainable.module])
