"""The adapters of one block of a model, taken together: a few large operations instead of many small ones.

Each time the block runs, its adapters' matrices are brought to the number type of the computation by one operation, and their
gradients back by another. Adapters of layers that share an input lie side by side in that copy, and are computed as one.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library.models.number_types import product_dtype
from networks.lora_module import Joint, LoRAModule

Unit = tuple[LoRAModule, ...]
"""One adapter, or several whose layers have one input and are computed together."""


class LoRABlock:
    """Runs a block of the model with its adapters' matrices at hand in the number type of the computation.

    The copies live as long as the block's own activations: under gradient checkpointing they are gone when the block has run, and
    made again with it.

    Args:
        block: its `forward` is replaced by `apply_to`; its first argument is a tensor in the type of the computation.
        adapters: of its layers, by `id` of the layer.
    """

    def __init__(self, block: nn.Module, adapters: Mapping[int, LoRAModule]) -> None:
        self._block = block
        self._plain_forward: Callable[..., Any] = block.forward
        own = {id(layer): adapters[id(layer)] for layer in block.modules() if id(layer) in adapters}
        inputs: Any = block.shared_inputs  # a method of whatever has this name
        shared = [tuple(own[id(layer)] for layer in layers) for layers in inputs() if all(id(layer) in own for layer in layers)]
        units = [unit for unit in shared if len({tuple(matrix.shape for matrix in each.matrices) for each in unit}) == 1]
        in_units = {id(adapter) for unit in units for adapter in unit}
        self._units: list[Unit] = [*units, *((adapter,) for adapter in own.values() if id(adapter) not in in_units)]

    def apply_to(self) -> None:
        """Put this into the block's forward pass, if the block has adapters."""
        if self._units:
            self._plain_forward = self._block.forward
            self._block.forward = self.forward

    def forward(self, *inputs: Tensor) -> Any:
        """Return the block's output."""
        dtype = product_dtype(inputs[0])
        parts = [part for unit in self._units for part in _parts(unit)]
        units = [part for part in parts if len(part) > 1 or part[0].lora_down.weight.dtype != dtype]
        for unit, matrices in zip(units, cast_together(units, dtype), strict=True):
            first = unit[0]
            if len(unit) == 1:
                first.at_hand.matrices = matrices
            else:
                first.at_hand.joint = Joint(tuple(adapter.layer for adapter in unit), *matrices, first.strength)
        try:
            return self._plain_forward(*inputs)
        finally:
            for unit in units:
                unit[0].at_hand.clear()


def cast_together(units: Sequence[Unit], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return D and U of each unit in `dtype`: of one adapter as they are, of n adapters (n·r, I) and (n, O, r).

    Args:
        units: of linear layers; their matrices are of one type.
        dtype: of the result.
    """
    if not units:
        return []
    pieces: list[_Piece] = []
    for unit in units:
        for matrices in zip(*(adapter.matrices for adapter in unit), strict=True):
            pieces.append(_Piece(len(unit), matrices[0].shape, is_stacked=len(pieces) % 2 == 1))
    weights = [matrix for unit in units for matrices in zip(*(a.matrices for a in unit), strict=True) for matrix in matrices]
    cast = _CastTogether.apply(dtype, tuple(pieces), *weights)
    return list(zip(cast[::2], cast[1::2], strict=True))


class _Piece(NamedTuple):
    """A part of the copy: some matrices of one shape."""

    number: int
    shape: torch.Size
    is_stacked: bool
    """Whether several get an axis of their own; else they lie one below the other."""

    def whole(self) -> tuple[int, ...]:
        """Return the shape of all together."""
        if self.number == 1:
            return tuple(self.shape)
        return (self.number, *self.shape) if self.is_stacked else (self.number * self.shape[0], *self.shape[1:])


class _CastTogether(torch.autograd.Function):
    """Copies matrices into one new piece of memory of another type, and their gradients likewise."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, pieces: Sequence[_Piece], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.pieces, ctx.dtype = pieces, weights[0].dtype
        copies = _room(weights[0], dtype, [weight.shape for weight in weights])
        torch._foreach_copy_(copies, list(weights))
        firsts = accumulate((piece.number for piece in pieces[:-1]), initial=0)
        return tuple(_contiguous(copies[first], piece.whole()) for first, piece in zip(firsts, pieces, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [grad for grad in grads if grad is not None]
        if there and there[0].dtype != ctx.dtype:
            found, there = there, _room(there[0], ctx.dtype, [grad.shape for grad in there])
            torch._foreach_copy_(there, found)
        arrived = iter(there)
        result: list[Tensor | None] = []
        for grad, piece in zip(grads, ctx.pieces, strict=True):
            result += [None] * piece.number if grad is None else next(arrived).view(piece.number, *piece.shape).unbind()
        return None, None, *result


def _room(like: Tensor, dtype: torch.dtype, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return new tensors that lie one behind the other in one piece of memory."""
    sizes = [shape.numel() for shape in shapes]
    parts = like.new_empty(sum(sizes), dtype=dtype).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _contiguous(first: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor that begins where `first` does and goes on in the memory behind it."""
    strides = list(accumulate(reversed(shape[1:]), lambda stride, size: stride * size, initial=1))
    return first.as_strided(shape, strides[::-1])


def _parts(unit: Unit) -> Sequence[Unit]:
    """Return the unit if it can be computed as one now, else its adapters that act, each by itself."""
    if len(unit) > 1 and all(adapter.can_join for adapter in unit) and len({adapter.strength for adapter in unit}) == 1:
        return (unit,)
    return [(adapter,) for adapter in unit if adapter.acts]
