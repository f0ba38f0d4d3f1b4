"""Weights in 8 and 4 bits that share a scale in blocks, by the kernels of bitsandbytes.

Convolutions are taken channels last, the order in which a GPU computes them, so that unpacking puts nothing in another order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_kernels = torch.ops.bitsandbytes

BLOCK_OF_INT8 = 256
"""Weights that share a float32 scale: 8.125 bits each."""
BLOCK_OF_NF4 = 64
"""Weights that share a scale of 8 bits; 256 such scales share one of float32: 4.127 bits each."""


@dataclass(frozen=True)
class Int8:
    """Stores w as n·s/127 with the nearest n in −127…127, where s = max|w| of 256 weights: an error of at most s/254."""

    name: ClassVar[str] = "int8"

    def accepts(self, shape: torch.Size) -> bool:
        """Take every weight."""
        return True

    def pack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the bytes, a scale for each block, and the 256 numbers that bytes stand for."""
        _load_kernels()
        numbers = torch.linspace(-1, 1, 255, device=tensor.device)
        numbers = torch.cat([numbers, numbers[-1:]])
        packed, scales = _kernels.quantize_blockwise(_flat(tensor), numbers, BLOCK_OF_INT8)
        return packed, scales, numbers

    def unpack(self, parts: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return n·s/127, computed in float32 and rounded once."""
        packed, scales, numbers = parts
        flat = _kernels.dequantize_blockwise(packed, scales, numbers, BLOCK_OF_INT8, _kernel_dtype(dtype))
        return _shaped(flat, shape).to(dtype)


@dataclass(frozen=True)
class NormalFloat4:
    """Stores w as one of 16 multiples of the largest of 64 weights, spaced as quantiles of a normal distribution are.

    QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), with the double quantisation of scales: less their mean, they are stored in
    8 bits too. Bit for bit what `bitsandbytes.functional.quantize_4bit` does with `compress_statistics`.
    """

    name: ClassVar[str] = "nf4"
    block_of_scales: ClassVar[int] = 256

    def accepts(self, shape: torch.Size) -> bool:
        """Take weights of whole blocks; first and last layers, whose few channels would share scales, stay as they are."""
        return min(shape[:2]) >= BLOCK_OF_NF4 and shape.numel() % BLOCK_OF_NF4 == 0

    def pack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return two weights to a byte, the scales in 8 bits, their scales, the numbers they stand for, and their mean."""
        _load_kernels()
        packed, scales = _kernels.quantize_4bit(_flat(tensor), BLOCK_OF_NF4, self.name, torch.uint8)
        mean = scales.mean()
        numbers = torch.tensor(_dynamic_numbers(), device=tensor.device)
        packed_scales, their_scales = _kernels.quantize_blockwise(scales - mean, numbers, self.block_of_scales)
        return packed.view(-1), packed_scales, their_scales, numbers, mean

    def unpack(self, parts: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return number times scale, computed in float32 and rounded once."""
        packed, packed_scales, their_scales, numbers, mean = parts
        scales = _kernels.dequantize_blockwise(packed_scales, their_scales, numbers, self.block_of_scales, torch.float32)
        rows = [shape.numel() // BLOCK_OF_NF4, BLOCK_OF_NF4]
        scales += mean
        flat = _kernels.dequantize_4bit(packed, scales, BLOCK_OF_NF4, self.name, rows, _kernel_dtype(dtype))
        return _shaped(flat.view(-1), shape).to(dtype)


def _load_kernels() -> None:
    """Import bitsandbytes, which registers its kernels; it takes seconds."""
    import bitsandbytes  # noqa: F401


@cache
def _dynamic_numbers() -> tuple[float, ...]:
    """Return bitsandbytes' 256 numbers for scales (Dettmers 2016, arXiv:1511.04561): closer together around zero."""
    from bitsandbytes.functional import create_dynamic_map

    with _disable_current_modes():  # fake tensors have no numbers
        return tuple(create_dynamic_map().tolist())


def _flat(tensor: Tensor) -> Tensor:
    """Return the elements in a row, in a type the kernels know: (O, I) as it is, (O, I, h, w) channels last."""
    ordered = tensor.movedim(1, -1) if tensor.ndim > 2 else tensor
    return ordered.reshape(-1).to(_kernel_dtype(tensor.dtype))


def _shaped(flat: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_flat`; convolutions come out channels last."""
    if len(shape) < 3:
        return flat.view(shape)
    return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


INT8, NF4 = Int8(), NormalFloat4()
