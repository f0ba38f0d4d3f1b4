"""The denoiser from its file to the training step: how its weights are held, and what its forward pass keeps where."""

from collections.abc import Sequence

import torch
from torch import nn

from library.memory.block_swap import FROZEN_PLACES, TRAINED_PLACES, large_tensors, parts_of, swap_blocks
from library.memory.host_activations import HOST, keep_on_host
from library.memory.swap_choice import check_count, choose, count_for_share
from library.models.family import Family
from library.options.groups.precision import StepPrecisionOptions
from library.options.scripts import TrainingOptions
from library.training.setting import PartDTypes, Setting


def load_denoiser(setting: Setting, dtypes: PartDTypes) -> nn.Module:
    """Load the denoiser, frozen, and prepare it.

    One whose blocks are swapped may be larger than the device, so it stays in main memory until `arrange_denoiser` divides it. What
    is packed on the way is not: packing is the device's work.
    """
    precision, device = setting.options.precision, setting.accelerator.device
    waits = precision.swaps_blocks and dtypes.hold_denoiser is None
    denoiser = setting.family.load_denoiser(dtypes.denoiser, HOST if waits else device, dtypes.hold_denoiser)
    prepare_denoiser(setting.family, denoiser, precision, device)
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


def arrange_denoiser(
    family: Family,
    denoiser: nn.Module,
    attached: nn.Module,
    precision: StepPrecisionOptions,
    device: torch.device,
    host: torch.device = HOST,
) -> None:
    """Decide how the denoiser runs, now that everything is attached to it and what is trained is not frozen.

    Args:
        family: knows its blocks.
        denoiser: changed in place.
        attached: holds every trained parameter, some of which may take part in the denoiser's forward pass.
        precision: says what is kept in main memory.
        device: that computes.
        host: what stands for main memory.

    Raises:
        UserError: more or fewer blocks were asked for than can be swapped.
    """
    if precision.cpu_offload_checkpointing:
        keep_on_host(denoiser, [attached], device=device, host=host)
    if precision.swaps_blocks:
        is_trained = any(parameter.requires_grad for parameter in denoiser.parameters())
        places = TRAINED_PLACES if is_trained else FROZEN_PLACES
        blocks = list(family.blocks(denoiser).values())
        swapped = [blocks[number] for number in blocks_to_swap(denoiser, blocks, precision, places)]
        swap_blocks(denoiser, swapped, places, device)


def check_swapping(family: Family, options: TrainingOptions) -> None:
    """Refuse numbers of blocks that no model of this size has, before anything is indexed, loaded or cached.

    Raises:
        UserError: naming what is allowed.
    """
    if options.precision.swaps_blocks:
        skeleton = family.skeletons()[family.denoiser_name]
        places = TRAINED_PLACES if options.trains_denoiser else FROZEN_PLACES
        blocks_to_swap(skeleton, list(family.blocks(skeleton).values()), options.precision, places)


def blocks_to_swap(denoiser: nn.Module, blocks: Sequence[nn.Module], precision: StepPrecisionOptions, places: int) -> list[int]:
    """Return the numbers of the blocks that `--blocks_to_swap` or `--offload_fraction` keep in main memory.

    Args:
        denoiser: on any device.
        blocks: of it, in the order of the forward pass.
        precision: with one of both options.
        places: blocks that are on the device at a time.

    Raises:
        UserError: naming what is allowed.
    """
    sizes = [sum(tensor.nbytes for tensor in large_tensors(block)) for block in blocks]
    count = precision.blocks_to_swap
    if precision.offload_fraction is not None:
        total = sum(part.nbytes for parameter in denoiser.parameters() for part in parts_of(parameter))
        count = count_for_share(sizes, total, precision.offload_fraction, places)
    check_count(count or 0, len(blocks), places)
    return choose(sizes, count or 0, places)
