"""GEGLU, value · GELU(gate) (Shazeer 2020, "GLU Variants Improve Transformer"), and its gradient; both halves in one tensor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gated(halves: Tensor) -> Tensor:
    """Return value · GELU(gate) of value and gate side by side: (…, 2n) to (…, n). Autograd keeps nothing but them."""
    out: Tensor = _Gated.apply(halves)
    return out


def gated_values(halves: Tensor) -> Tensor:
    """Return what `gated` does, for autograd functions, which say themselves what is kept and how gradients come about."""
    value, gate = halves.chunk(2, dim=-1)
    return value * F.gelu(gate)


def gated_gradient(grad: Tensor, halves: Tensor, *, overwrite: bool = False) -> Tensor:
    """Return the gradient of the halves (…, 2n) from that of the result (…, n).

    Args:
        grad: of the result.
        halves: as `gated` got them.
        overwrite: whether `grad` is nobody else's, so that its room may be used: steps have their peak of memory here.
    """
    value, gate = halves.chunk(2, dim=-1)
    of_gate = torch.ops.aten.gelu_backward(grad * value, gate)
    of_value = grad.mul_(F.gelu(gate)) if overwrite else grad * F.gelu(gate)
    return torch.cat([of_value, of_gate], dim=-1)


class _Gated(torch.autograd.Function):
    """Keeps the halves, where autograd would keep GELU(gate) too."""

    @staticmethod
    def forward(ctx: Any, halves: Tensor) -> Tensor:
        ctx.save_for_backward(halves)
        return gated_values(halves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (halves,) = ctx.saved_tensors
        return gated_gradient(grad, halves)
