"""The number type that a product of matrices has, autocast or not."""

import torch
from torch import Tensor


def product_dtype(x: Tensor, otherwise: torch.dtype | None = None) -> torch.dtype:
    """Return the dtype that linear layers and convolutions compute in for an input: autocast's where it is on.

    Args:
        x: the input.
        otherwise: without autocast; None for the input's own.
    """
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else otherwise or x.dtype
