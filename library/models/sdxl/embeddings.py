"""Sinusoidal embeddings of timesteps and sizes, in float32.

PE(v)_k = cos(v f_k), PE(v)_{D/2+k} = sin(v f_k), f_k = 10000^(-k/(D/2)), k = 0 … D/2 − 1: cosines first.
Reference: Vaswani et al. 2017 (3.5) in the arrangement of Ho et al. 2020.
"""

import math

import torch
from torch import Tensor

from library.models.family import SizeConditioning


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """Embed numbers.

    Args:
        values: (…) of any real dtype.
        dim: even width D of the result.

    Returns:
        (…, D) float32, on the device of `values`.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def size_embedding(sizes: SizeConditioning, dim: int) -> Tensor:
    """Embed the six numbers SDXL is conditioned on: original h, w, crop top, left, target h, w.

    Args:
        sizes: (B, 2) each.
        dim: width of one number's embedding (256 in SDXL).

    Returns:
        (B, 6·dim) float32.
    """
    numbers = torch.cat([sizes.original_hw, sizes.crop_top_left, sizes.target_hw], dim=1)
    return sinusoid(numbers, dim).flatten(1)
