"""The layers of the SDXL U-Net, with the parameter names of its checkpoints.

Shapes: B batch, C channels, h and w latent height and width, L = h·w tokens, S context tokens, D context width,
E time embedding width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.models.forwards import owner_of
from library.models.geglu import gated
from library.models.sdxl.attention import Attend, sdpa


class GroupNorm(nn.GroupNorm):
    """GroupNorm whose result has the dtype of its input, also under autocast.

    The kernels take mean and variance in float32 for half-precision input. Autocast would return float32 instead and double the
    memory of everything kept for the backward pass.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, …) to the same shape and dtype."""
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        if not torch.is_autocast_enabled(input.device.type):
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)
        with torch.autocast(input.device.type, enabled=False):
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose result has the dtype of its input, also under autocast; see `GroupNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, C) to the same shape and dtype."""
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        if not torch.is_autocast_enabled(input.device.type):
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class Block(nn.Module):
    """A layer of the U-Net that its backward pass can have computed again, at the price of its forward pass."""

    recompute = False
    """Keep only its inputs for the backward pass."""


class ResnetBlock2D(Block):
    """skip(x) + conv(SiLU(GN(conv(SiLU(GN(x))) + Linear(SiLU(emb)))))."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, norm_groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(norm_groups, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, out_channels))
        # The Identity keeps the place of the original's dropout, so that the convolution is out_layers.3 as in checkpoints.
        self.out_layers = nn.Sequential(
            GroupNorm(norm_groups, out_channels), nn.SiLU(), nn.Identity(), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )
        same = in_channels == out_channels
        self.skip_connection: nn.Module = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x (B, C_in, h, w) and emb (B, E) to (B, C_out, h, w)."""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        h = self.out_layers(h)
        out: Tensor = self.skip_connection(x) + h
        return out


class Downsample2D(Block):
    """Halve height and width with a strided convolution, padded on all sides."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h/2, w/2)."""
        out: Tensor = self.op(x)
        return out


class Upsample2D(Block):
    """Double height and width by repetition, then convolve."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, 2h, 2w)."""
        with torch.autocast(x.device.type, enabled=False):  # on a GPU it would repeat in float32, twice the memory for nothing
            larger = F.interpolate(x, scale_factor=2.0, mode="nearest")
        out: Tensor = self.conv(larger)
        return out


class Attention(nn.Module):
    """Multi-head attention; self-attention when no context is given. `attend` is how it is computed."""

    def __init__(self, dim: int, context_dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.attend: Attend = sdpa
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """To query, key and value."""
        return self.to_q, self.to_k, self.to_v

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map x (B, L, C) and context (B, S, D) to (B, L, C)."""
        key_and_value = self.projections[1:]
        projected = apply_all(self.projections, x) if context is None else (self.to_q(x), *apply_all(key_and_value, context))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in projected)
        out: Tensor = self.to_out(self.attend(q, k, v).flatten(2))
        return out


def apply_all(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """Return what each layer gives for one input.

    Where the first layer's `forward` was replaced by the method of an object whose `joint` is not None, that computes all.
    """
    joint = getattr(owner_of(layers[0].forward), "joint", None)
    return tuple(layer(x) for layer in layers) if joint is None else joint(x)


class GEGLU(nn.Module):
    """value · GELU(gate), both from one projection (Shazeer 2020)."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) to (…, inner_dim)."""
        return gated(self.proj(x))


class FeedForward(nn.Module):
    """Linear(GEGLU(x))."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        # The Identity keeps the place of the original's dropout: the second Linear is net.2 in checkpoints.
        self.net = nn.Sequential(GEGLU(dim, inner_dim), nn.Identity(), nn.Linear(inner_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to the same shape.

        Where the last layer's `forward` was replaced by the method of an object that has an `after_gate`, that computes the gate
        with it, and need not keep the result.
        """
        gate: Any = self.net[0]
        after_gate = getattr(owner_of(self.net[2].forward), "after_gate", None)
        out: Tensor = self.net(x) if after_gate is None else after_gate(gate.proj(x))
        return out


class BasicTransformerBlock(Block):
    """Self-attention, cross-attention and feed-forward, each pre-normalised and added to its input."""

    def __init__(self, dim: int, context_dim: int, head_dim: int, inner_dim: int) -> None:
        super().__init__()
        self.attn1 = Attention(dim, dim, head_dim)
        self.ff = FeedForward(dim, inner_dim)
        self.attn2 = Attention(dim, context_dim, head_dim)
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.norm3 = LayerNorm(dim)

    def shared_inputs(self) -> tuple[tuple[nn.Linear, ...], ...]:
        """Return the layers that are given one input: what stands in their place may compute them together, see `apply_all`."""
        return self.attn1.projections, self.attn2.projections[1:]

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map x (B, L, C) and context (B, S, D) to (B, L, C)."""
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        out: Tensor = self.ff(self.norm3(x)) + x
        return out


class Transformer2DModel(nn.Module):
    """Basic transformer blocks over the pixels of a feature map, between two linear projections, added to the input."""

    def __init__(self, channels: int, depth: int, context_dim: int, head_dim: int, inner_dim: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, head_dim, inner_dim) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map x (B, C, h, w) and context (B, S, D) to (B, C, h, w)."""
        _, channels, height, width = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(-1, height * width, channels)
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = run_block(block, h, context)
        h = self.proj_out(h)
        out: Tensor = x + h.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        return out


def run_block(block: nn.Module, *inputs: Tensor) -> Tensor:
    """Call a block; one that is to be computed again keeps only its inputs for the backward pass."""
    recompute = block.recompute and torch.is_grad_enabled()
    out: Tensor = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
    return out
