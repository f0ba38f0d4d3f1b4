"""The SDXL U-Net, in the names of its single-file checkpoints.

Shapes: B batch, h and w latent height and width (multiples of 4), S context tokens, D context width, V vector width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from library.models.number_types import product_dtype
from library.models.sdxl.attention import load_attention
from library.models.sdxl.embeddings import sinusoid
from library.models.sdxl.layers import (
    Attention,
    BasicTransformerBlock,
    Block,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    Transformer2DModel,
    Upsample2D,
    run_block,
)
from library.models.sdxl.sizes import (
    BlockSizes,
    DownsampleSize,
    LayerSize,
    ResnetSize,
    StemSize,
    TransformerSize,
    UNetSizes,
    UpsampleSize,
)


class UNetEncoder(nn.Module):
    """What a U-Net and its ControlNet share: the embeddings, the way down and the middle block.

    Runs in the dtype of its weights, or in autocast's. Each residual block, basic transformer block and sampler can be made to keep
    only its inputs for the backward pass; that acts whenever gradients are recorded.
    """

    def __init__(self, sizes: UNetSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.time_embed = _two_linears(sizes.model_channels, sizes.time_dim)
        self.label_emb = nn.Sequential(_two_linears(sizes.vector_dim, sizes.time_dim))
        self.input_blocks = nn.ModuleList(_make_block(block, sizes) for block in sizes.input_blocks)
        self.middle_block = _make_block(sizes.middle_block, sizes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.time_embed[0].weight.dtype  # type: ignore[return-value]  # a Sequential's item is a plain Module to mypy

    def embedded(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x and context in the type of the computation, and the embedding (B, E) of timesteps and y; see `UNet.forward`."""
        dtype = product_dtype(x, self.dtype)  # inputs that many layers share are cast once
        x, context, y = x.to(dtype), context.to(dtype), y.to(dtype)
        time = sinusoid(timesteps.expand(x.shape[0]), self.sizes.model_channels).to(dtype)
        return x, context, self.time_embed(time) + self.label_emb(y)

    def encoded(self, x: Tensor, context: Tensor, emb: Tensor, hint: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Run the input blocks and the middle block.

        Args:
            x: (B, 4, h, w).
            context: (B, S, D).
            emb: (B, E).
            hint: (B, C, h, w), added to what the first block gives; None for none.

        Returns:
            What each input block gave, and what the middle block gave.
        """
        h = x
        skips: list[Tensor] = []
        for block in self.input_blocks:
            h = self._run_block(block, h, emb, context)
            if hint is not None and not skips:
                h = h + hint
            skips.append(h)
        return skips, self._run_block(self.middle_block, h, emb, context)

    def blocks(self) -> dict[str, Block]:
        """Return residual blocks, basic transformer blocks and samplers by name, in the order of the forward pass."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Block)}

    def blocks_by_cost(self) -> list[str]:
        """Return the names of the blocks, those first that keep most for the backward pass beside what computing them again takes.

        Traced at 1024² and other sizes, in MiB for a GFLOP: transformer blocks of 640 channels 1.3, of 1280 channels 1.0; residual
        blocks 0.8 (320 channels) to 0.2 (1280), the fewer weights the more; samplers below 0.2. Among equals the earlier: when its
        turn comes in the backward pass, what later ones kept is gone.
        """
        blocks = self.blocks()
        return sorted(blocks, key=lambda name: (_place(blocks[name]), sum(weight.numel() for weight in blocks[name].parameters())))

    def enable_gradient_checkpointing(self, fraction: float = 1.0) -> None:
        """Switch gradient checkpointing on.

        Args:
            fraction: of the blocks, 0 to 1, the cheapest first; the others keep what they compute.
        """
        blocks, names = self.blocks(), self.blocks_by_cost()
        count = max(round(fraction * len(names)), fraction > 0)
        for number, name in enumerate(names):
            blocks[name].recompute = number < count

    def set_attention(self, kind: str) -> None:
        """Choose how attention is computed.

        Args:
            kind: "sdpa", "xformers", "mem_eff_attn" or "plain".

        Raises:
            UserError: the package it needs is not installed.
        """
        attend = load_attention(kind)
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend

    def _run_block(self, block: nn.Module, h: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in block.children():
            if isinstance(layer, ResnetBlock2D):
                h = run_block(layer, h, emb)
            elif isinstance(layer, Transformer2DModel):
                h = layer(h, context)
            elif isinstance(layer, nn.Conv2d):
                h = layer(h)
            else:
                h = run_block(layer, h)
        return h


class UNet(UNetEncoder):
    """Predicts the noise (or velocity) in latents from a timestep, a text context and a vector of pooled text and sizes."""

    def __init__(self, sizes: UNetSizes) -> None:
        super().__init__(sizes)
        self.output_blocks = nn.ModuleList(_make_block(block, sizes) for block in sizes.output_blocks)
        self.out = nn.Sequential(
            GroupNorm(sizes.norm_groups, sizes.model_channels),
            nn.SiLU(),
            nn.Conv2d(sizes.model_channels, sizes.out_channels, 3, padding=1),
        )

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor, residuals: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Run the network.

        Args:
            x: (B, 4, h, w) noisy latents.
            timesteps: (B,) or (), 0 … 999, integer or fractional.
            context: (B, S, D) text context.
            y: (B, V) pooled text and size embeddings.
            residuals: added to what each input block hands to the way up, and, the last one, to what the middle block gives.

        Returns:
            (B, 4, h, w) in the dtype the convolutions run in.
        """
        x, context, emb = self.embedded(x, timesteps, context, y)
        skips, h = self.encoded(x, context, emb)
        if residuals is not None:
            skips = [skip + residual.to(skip.dtype) for skip, residual in zip(skips, residuals[:-1], strict=True)]
            h = h + residuals[-1].to(h.dtype)
        for block in self.output_blocks:
            h = self._run_block(block, torch.cat([h, skips.pop()], dim=1), emb, context)
        out: Tensor = self.out(h)
        return out


def _place(block: Block) -> int:
    return next(place for place, kind in enumerate(_CHEAPEST_FIRST) if isinstance(block, kind))


def _two_linears(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, out_dim), nn.SiLU(), nn.Linear(out_dim, out_dim))


def _make_block(block: BlockSizes, sizes: UNetSizes) -> nn.Sequential:
    return nn.Sequential(*(_MAKERS[type(layer)](layer, sizes) for layer in block))


def _make_transformer(size: TransformerSize, sizes: UNetSizes) -> Transformer2DModel:
    return Transformer2DModel(size.channels, size.depth, size.context_dim, size.head_dim, size.inner_dim, sizes.norm_groups)


_CHEAPEST_FIRST = (BasicTransformerBlock, ResnetBlock2D, Upsample2D, Downsample2D)
"""The kinds of blocks in the order in which it pays to compute them again."""

_MAKERS: dict[type[LayerSize], Callable[..., nn.Module]] = {
    StemSize: lambda size, _: nn.Conv2d(size.in_channels, size.out_channels, 3, padding=1),
    ResnetSize: lambda size, sizes: ResnetBlock2D(size.in_channels, size.out_channels, sizes.time_dim, sizes.norm_groups),
    TransformerSize: _make_transformer,
    DownsampleSize: lambda size, _: Downsample2D(size.in_channels, size.out_channels),
    UpsampleSize: lambda size, _: Upsample2D(size.in_channels, size.out_channels),
}
