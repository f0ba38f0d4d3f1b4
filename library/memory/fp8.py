"""Weights in 8 bits: float8 with a scale of its own for each tensor.

float8_e4m3fn (Micikevicius et al. 2022, arXiv:2209.05433) has 3 bits of mantissa and ends at 448. Weights of a trained model lie
far below 1, where a bare cast would leave them few bits or none, so they are scaled to fill the range first. The scale is a power
of two: multiplying by it loses nothing in any number type, and the relative error stays that of the format, 2⁻⁴ at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

LARGEST = 448.0
"""The largest number of float8_e4m3fn."""


@dataclass(frozen=True)
class ScaledFloat8:
    """Stores w as round(w / s) in float8_e4m3fn and s in float32; s = 2^⌈log₂(max|w| / 448)⌉ or twice that.

    The error of an element is at most max(2⁻⁴·|w|, 2⁻¹⁰·s): half a unit of the last place, above and below the smallest normal
    number.
    """

    name: ClassVar[str] = "float8"

    def accepts(self, shape: torch.Size) -> bool:
        """Take every weight."""
        return True

    def pack(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bytes, in the shape and memory format of `tensor`, and the scale, a scalar."""
        scale = _scale(tensor.abs().amax().float())
        return (tensor.float() / scale).to(torch.float8_e4m3fn), scale

    def unpack(self, parts: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return round(w / s)·s; exact in bfloat16 and float32."""
        packed, scale = parts
        return packed.to(dtype).mul_(scale)


def _scale(largest: Tensor) -> Tensor:
    """Return the power of two that brings `largest` to at most 448; 1 where everything is zero."""
    _, exponent = torch.frexp(largest / LARGEST)  # largest / 448 = m·2^exponent with m below 1
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1.0)


SCALED_FLOAT8 = ScaledFloat8()
"""The codec of `--base_quant fp8` and `--fp8_base`."""
