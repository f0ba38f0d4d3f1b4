"""The VAE as diffusers' AutoencoderKL, and its names in single-file checkpoints."""

import re
from collections.abc import Mapping

import torch
from torch import nn

from library.models.sdxl.sizes import VaeSizes
from library.models.weights import Entry, Part

VAE_TILE = 1024
"""Side of tiles in pixels."""

_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
        (r"^encoder\.down\.(\d+)\.downsample\.conv\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
        (r"^decoder\.up\.(\d+)\.block\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
        (r"^decoder\.up\.(\d+)\.upsample\.conv\.", r"decoder.up_blocks.\1.upsamplers.0.conv."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
        # Names of diffusers before version 0.18.
        (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
        (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
        (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
        (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
    )
)


def vae_name(name: str, levels: int) -> str:
    """Return the diffusers name of a VAE tensor, given its single-file name (without prefix) or any diffusers name.

    Args:
        name: of the tensor.
        levels: how many levels the VAE has; single files count the decoder's from the other end.
    """
    of_single_file = re.match(r"decoder\.up\.(\d+)\.", name)
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    if of_single_file:
        name = re.sub(r"up_blocks\.\d+", f"up_blocks.{levels - 1 - int(of_single_file[1])}", name, count=1)
    return name


def is_attention_matrix(name: str) -> bool:
    """Tell whether a diffusers VAE name is one of the matrices that single files store as 1×1 convolutions."""
    return ".attentions.0.to_" in name and name.endswith(".weight")


def vae_part(tensors: Mapping[str, Entry]) -> Part:
    """Return VAE tensors, under single-file names (without prefix) or diffusers names, as diffusers' VAE wants them."""
    levels = count_levels(tensors)
    part = {}
    for name, entry in tensors.items():
        name = vae_name(name, levels)
        part[name] = entry.then(lambda t: t.flatten(1), entry.shape[:2]) if is_attention_matrix(name) else entry
    return part


def count_levels(names: Mapping[str, object]) -> int:
    """Return the number of levels of a VAE, given its tensors under either kind of name."""
    return 1 + max((int(m[1]) for name in names if (m := re.match(r"encoder\.down(?:_blocks)?\.(\d+)\.", name))), default=-1)


def build_vae(sizes: VaeSizes) -> nn.Module:
    """Build the VAE with all parameters on the meta device."""
    from diffusers import AutoencoderKL  # more than a second, which a run with cached latents is spared

    levels = len(sizes.widths)
    with torch.device("meta"):
        vae: nn.Module = AutoencoderKL(
            in_channels=sizes.image_channels,
            out_channels=sizes.image_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=sizes.widths,
            layers_per_block=sizes.layers_per_block,
            latent_channels=sizes.latent_channels,
            norm_num_groups=sizes.norm_groups,
            sample_size=VAE_TILE,
            scaling_factor=sizes.scaling_factor,
            force_upcast=True,
        )
    return vae
