"""A frozen layer plus a low-rank adapter as one operation: W₀x + b + s·U(mask ∘ Dx).

LoRA, Hu et al. 2021 (arXiv:2106.09685), with s = multiplier·α/r. Written as one autograd function because the adapter then costs
two matrix products forward, added onto the base output in place, and keeps only its input and the (rows, r) product: no second
output, no scaled copy, and the two gradients of the input are accumulated inside a product too.

Shapes: N rows (all axes but the last), I and O input and output features, r rank; B batch, H and W of the output for convolutions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library.models.geglu import gated_gradient, gated_values

Pair = tuple[int, int]


def adapted_linear(
    x: Tensor, base: nn.Linear, down: Tensor, up: Tensor, scale: float, mask: Tensor | None, is_gated: bool = False
) -> Tensor:
    """Return base(x) + scale·U(mask ∘ Dx).

    Args:
        x: (…, I); value and gate of GEGLU side by side, (…, 2·I), where `is_gated`.
        base: its weight and bias are frozen; gradients for them are not computed.
        down: D, (r, I), in `product_dtype(x)` as U is.
        up: U, (O, r).
        scale: multiplier·α/r.
        mask: dropout factors, broadcast against (…, r); None for no dropout.
        is_gated: whether the layer's input is value · GELU(gate). That is computed again for the gradients instead of being kept.

    Returns:
        (…, O) in `product_dtype(x)`.
    """
    out: Tensor = _AdaptedLinear.apply(x, base.weight, base.bias, down, up, scale, mask, is_gated)
    return out


def adapted_linears(x: Tensor, weights: Sequence[Tensor], down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Return W₀x + scale·UDx of n layers that share their input and have equally many outputs, from products of all at once.

    Args:
        x: (…, I).
        weights: n frozen W₀, (O, I).
        down: their D one below the other, (n·r, I), in `product_dtype(x)` as U is.
        up: their U, (n, O, r).
        scale: multiplier·α/r, of all.

    Returns:
        n tensors (…, O), which share one piece of memory.
    """
    out: Tensor = _AdaptedLinears.apply(x, down, up, scale, *weights)
    return out.unbind()


def adapted_conv2d(x: Tensor, base: nn.Conv2d, down: Tensor, up: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Return base(x) + scale·U(mask ∘ D∗x), D having the base's kernel, stride, padding and dilation.

    Args:
        x: (B, I, h, w).
        base: a convolution of one group with zero padding; its weight and bias are frozen.
        down: D, (r, I, kh, kw), in `product_dtype(x)` as U is.
        up: U, (O, r, 1, 1).
        scale: multiplier·α/r.
        mask: dropout factors, broadcast against (B, r, H, W); None for no dropout.

    Returns:
        (B, O, H, W) in `product_dtype(x)` and the memory format of the base's output.
    """
    geometry = (base.stride, base.padding, base.dilation)
    out: Tensor = _AdaptedConv2d.apply(x, base.weight, base.bias, down, up, scale, mask, geometry)
    return out


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale·(a @ b) of two matrices in one kernel; what is in the new buffer before does not count (beta = 0)."""
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scale)


class _AdaptedLinear(torch.autograd.Function):
    """The linear case; see `adapted_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        mask: Tensor | None,
        is_gated: bool,
    ) -> Tensor:
        ctx.x_dtype, ctx.scale, ctx.is_gated, dtype = x.dtype, scale, is_gated, down.dtype
        given = x
        x = (gated_values(x) if is_gated else x).to(dtype)
        out = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        low = F.linear(x, down)
        if mask is not None:
            low = low * mask
        out.view(-1, out.shape[-1]).addmm_(low.reshape(-1, low.shape[-1]), up.t(), alpha=scale)
        ctx.save_for_backward(given if is_gated else x, weight, down, up, low, mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, down, up, low, mask = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        low_rows = low.reshape(-1, low.shape[-1])
        grad_up = scaled_product(rows.t(), low_rows, ctx.scale) if ctx.needs_input_grad[4] else None
        grad_low = scaled_product(rows, up, ctx.scale)
        if mask is not None:
            grad_low = (grad_low.view_as(low) * mask).view_as(low_rows)
        grad_down = None
        if ctx.needs_input_grad[3]:
            x = gated_values(kept).to(down.dtype) if ctx.is_gated else kept
            grad_down = grad_low.t() @ x.reshape(-1, x.shape[-1])
            del x  # before the gradient of the gate needs room
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_rows = rows @ weight.to(grad)  # one in few bits is unpacked now, and not kept since the forward pass
            grad_x = grad_rows.addmm_(grad_low, down).view(*grad.shape[:-1], -1).to(ctx.x_dtype)
            if ctx.is_gated:
                grad_x = gated_gradient(grad_x, kept, overwrite=True)
        return grad_x, None, None, grad_down, grad_up, None, None, None


class _AdaptedLinears(torch.autograd.Function):
    """Several linear layers with one input; see `adapted_linears`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, scale: float, *weights: Tensor) -> Tensor:
        ctx.x_dtype, ctx.scale, dtype = x.dtype, scale, down.dtype
        x = x.to(dtype)
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(len(weights), len(rows), up.shape[1])
        for own, weight in zip(out, weights, strict=True):
            torch.mm(rows, weight.to(dtype).t(), out=own)
        low = _per_layer(rows @ down.t(), len(weights))
        out.baddbmm_(low, up.mT, alpha=scale)
        ctx.save_for_backward(x, down, up, low, *weights)
        return out.view(len(weights), *x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, low, *weights = ctx.saved_tensors
        needs_x, needs_down, needs_up, *_ = ctx.needs_input_grad
        n, rows = len(weights), x.reshape(-1, x.shape[-1])
        grads = grad.reshape(n, len(rows), -1)
        grad_up = torch.empty_like(up).baddbmm_(grads.mT, low, beta=0, alpha=ctx.scale) if needs_up else None
        grad_low = rows.new_empty(len(rows), len(down))
        _per_layer(grad_low, n).baddbmm_(grads, up, beta=0, alpha=ctx.scale)
        grad_down = grad_low.t() @ rows if needs_down else None
        grad_x = None
        if needs_x:
            grad_rows = grad_low @ down
            for own, weight in zip(grads, weights, strict=True):
                grad_rows.addmm_(own, weight.to(grad))
            grad_x = grad_rows.view_as(x).to(ctx.x_dtype)
        return grad_x, grad_down, grad_up, None, *(None for _ in weights)


class _AdaptedConv2d(torch.autograd.Function):
    """The convolution case; see `adapted_conv2d`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        mask: Tensor | None,
        geometry: tuple[Pair, Pair, Pair],
    ) -> Tensor:
        ctx.x_dtype, ctx.scale, ctx.geometry, dtype = x.dtype, scale, geometry, down.dtype
        x = x.to(dtype)
        out = F.conv2d(x, weight.to(dtype), None if bias is None else bias.to(dtype), *geometry)
        low = F.conv2d(x, down, None, *geometry)
        if mask is not None:
            low = low * mask
        _add_up_projection_(out, low, up.flatten(1), scale)
        ctx.save_for_backward(x, weight, down, up, low, mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, low, mask = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        grad_up = None
        if ctx.needs_input_grad[4]:
            grad_up = torch.einsum("bohw,brhw->or", grad, low).mul_(ctx.scale).view_as(up)
        grad_low = F.conv2d(grad, up.transpose(0, 1)).mul_(ctx.scale)
        if mask is not None:
            grad_low = grad_low * mask
        grad_x, grad_down = _conv_backward(grad_low, x, down, ctx.geometry, needs_x, ctx.needs_input_grad[3])
        if needs_x:
            base_grad_x, _ = _conv_backward(grad, x, weight.to(grad), ctx.geometry, True, False)
            grad_x = base_grad_x.add_(grad_x).to(ctx.x_dtype)
        return grad_x, None, None, grad_down, grad_up, None, None, None


def _per_layer(products: Tensor, n: int) -> Tensor:
    """Return (N, n·r) as (n, N, r), without a copy; a compiler can follow what is written into this kind of view."""
    rows, width = products.shape
    return products.as_strided((n, rows, width // n), (width // n, width, 1))


def _add_up_projection_(out: Tensor, low: Tensor, up: Tensor, scale: float) -> None:
    """Add scale·U·low to `out` in place; out (B, O, H, W), low (B, r, H, W), up (O, r). Either memory format, without copies."""
    batch, channels = out.shape[:2]
    flat, low, up = out.view(batch, channels, -1), low.flatten(2), up.expand(batch, -1, -1)
    if flat.stride(1) == 1:  # channels last: into its rows, as bfloat16 on a CPU takes a hundred times as long into columns
        flat.mT.baddbmm_(low.mT, up.mT, alpha=scale)
    else:
        flat.baddbmm_(up, low, alpha=scale)


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Pair, Pair, Pair], needs_x: bool, needs_weight: bool
) -> tuple[Any, Any]:
    """Return the gradients of a convolution's input and weight, None for the one that is not needed."""
    stride, padding, dilation = geometry
    mask = [needs_x, needs_weight, False]
    grads = torch.ops.aten.convolution_backward(grad, x, weight, None, stride, padding, dilation, False, (0, 0), 1, mask)
    return grads[0], grads[1]
