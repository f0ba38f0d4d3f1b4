"""A frozen layer plus a low-rank adapter as one operation: W₀x + b + s·U(mask ∘ Dx).

LoRA, Hu et al. 2021 (arXiv:2106.09685), with s = multiplier·α/r. Written as one autograd function because the adapter then costs
two matrix products forward, added onto the base output in place, and keeps only its input and the (rows, r) product: no second
output, no scaled copy, and the two gradients of the input are accumulated inside a product too.

Shapes: N rows (all axes but the last), I and O input and output features, r rank; B batch, H and W of the output for convolutions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library.models.number_types import product_dtype

Pair = tuple[int, int]


def adapted_linear(x: Tensor, base: nn.Linear, down: Tensor, up: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Return base(x) + scale·U(mask ∘ Dx).

    Args:
        x: (…, I).
        base: its weight and bias are frozen; gradients for them are not computed.
        down: D, (r, I).
        up: U, (O, r).
        scale: multiplier·α/r.
        mask: dropout factors, broadcast against (…, r); None for no dropout.

    Returns:
        (…, O) in `product_dtype(x)`.
    """
    out: Tensor = _AdaptedLinear.apply(x, base.weight, base.bias, down, up, scale, mask, product_dtype(x))
    return out


def adapted_conv2d(x: Tensor, base: nn.Conv2d, down: Tensor, up: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Return base(x) + scale·U(mask ∘ D∗x), D having the base's kernel, stride, padding and dilation.

    Args:
        x: (B, I, h, w).
        base: a convolution of one group with zero padding; its weight and bias are frozen.
        down: D, (r, I, kh, kw).
        up: U, (O, r, 1, 1).
        scale: multiplier·α/r.
        mask: dropout factors, broadcast against (B, r, H, W); None for no dropout.

    Returns:
        (B, O, H, W) in `product_dtype(x)` and the memory format of the base's output.
    """
    geometry = (base.stride, base.padding, base.dilation)
    out: Tensor = _AdaptedConv2d.apply(x, base.weight, base.bias, down, up, scale, mask, product_dtype(x), geometry)
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
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.x_dtype, ctx.scale = x.dtype, scale
        x = x.to(dtype)
        out = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        low = F.linear(x, down.to(dtype))
        if mask is not None:
            low = low * mask
        out.view(-1, out.shape[-1]).addmm_(low.reshape(-1, low.shape[-1]), up.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(x, weight, down, up, low, mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, low, mask = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        low_rows = low.reshape(-1, low.shape[-1])
        grad_up = scaled_product(rows.t(), low_rows, ctx.scale).to(up.dtype) if ctx.needs_input_grad[4] else None
        grad_low = scaled_product(rows, up.to(grad.dtype), ctx.scale)
        if mask is not None:
            grad_low = (grad_low.view_as(low) * mask).view_as(low_rows)
        grad_down = (grad_low.t() @ x.reshape(-1, x.shape[-1])).to(down.dtype) if ctx.needs_input_grad[3] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_rows = rows @ weight.to(grad.dtype)
            grad_x = grad_rows.addmm_(grad_low, down.to(grad.dtype)).view_as(x).to(ctx.x_dtype)
        return grad_x, None, None, grad_down, grad_up, None, None, None


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
        dtype: torch.dtype,
        geometry: tuple[Pair, Pair, Pair],
    ) -> Tensor:
        ctx.x_dtype, ctx.scale, ctx.geometry = x.dtype, scale, geometry
        x = x.to(dtype)
        out = F.conv2d(x, weight.to(dtype), None if bias is None else bias.to(dtype), *geometry)
        low = F.conv2d(x, down.to(dtype), None, *geometry)
        if mask is not None:
            low = low * mask
        _add_up_projection_(out, low, up.to(dtype).flatten(1), scale)
        ctx.save_for_backward(x, weight, down, up, low, mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, low, mask = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        grad_up = None
        if ctx.needs_input_grad[4]:
            grad_up = torch.einsum("bohw,brhw->or", grad, low).mul_(ctx.scale).view_as(up).to(up.dtype)
        grad_low = F.conv2d(grad, up.to(grad.dtype).transpose(0, 1)).mul_(ctx.scale)
        if mask is not None:
            grad_low = grad_low * mask
        grad_x, grad_down = _conv_backward(grad_low, x, down.to(grad.dtype), ctx.geometry, needs_x, ctx.needs_input_grad[3])
        if needs_x:
            base_grad_x, _ = _conv_backward(grad, x, weight.to(grad.dtype), ctx.geometry, True, False)
            grad_x = base_grad_x.add_(grad_x).to(ctx.x_dtype)
        grad_down = grad_down.to(down.dtype) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_down, grad_up, None, None, None, None


def _add_up_projection_(out: Tensor, low: Tensor, up: Tensor, scale: float) -> None:
    """Add scale·U·low to `out` in place; out (B, O, H, W), low (B, r, H, W), up (O, r). Either memory format, without copies."""
    batch, channels = out.shape[:2]
    out.view(batch, channels, -1).baddbmm_(up.expand(batch, -1, -1), low.flatten(2), alpha=scale)


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Pair, Pair, Pair], needs_x: bool, needs_weight: bool
) -> tuple[Any, Any]:
    """Return the gradients of a convolution's input and weight, None for the one that is not needed."""
    stride, padding, dilation = geometry
    mask = [needs_x, needs_weight, False]
    grads = torch.ops.aten.convolution_backward(grad, x, weight, None, stride, padding, dilation, False, (0, 0), 1, mask)
    return grads[0], grads[1]
