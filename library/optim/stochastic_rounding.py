"""Rounding that is right on average, so that bfloat16 weights also learn from steps far below their last digit."""

import torch
from torch import Tensor

_LOW_BITS = 0xFFFF
"""The part of a float32 that bfloat16 has no room for."""


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round up or down to bfloat16, each as often as the value is near, so that the expected result is the value itself.

    A uniform 16-bit integer is added to the bits of the float32, and the low 16 bits are dropped (Zamirai et al. 2020, "Revisiting
    BFloat16 Training"). Infinities and the NaN that arithmetic makes stay what they are.

    Args:
        values: float32, any shape.
        generator: on the device of `values`; draws one integer per value.

    Returns:
        bfloat16, of the same shape and memory layout.
    """
    bits = values.clone().view(torch.int32)
    bits += torch.randint(0, _LOW_BITS + 1, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    bits &= ~_LOW_BITS
    return bits.view(torch.float32).to(torch.bfloat16)
