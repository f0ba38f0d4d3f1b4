"""Sizes of the SDXL parts, read from tensor shapes, so that reduced checkpoints load through the same code as full ones.

What shapes cannot tell (head width, norm groups, CLIP heads and activations, the VAE's scaling factor) follows the convention of
the released models unless the file's `arch.*` metadata says otherwise.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class StemSize:
    """The first 3×3 convolution."""

    in_channels: int
    out_channels: int


@dataclass(frozen=True)
class ResnetSize:
    """A residual block."""

    in_channels: int
    out_channels: int


@dataclass(frozen=True)
class TransformerSize:
    """A transformer over a feature map."""

    channels: int
    depth: int
    context_dim: int
    head_dim: int
    inner_dim: int


@dataclass(frozen=True)
class DownsampleSize:
    """A convolution that halves height and width."""

    in_channels: int
    out_channels: int


@dataclass(frozen=True)
class UpsampleSize:
    """A convolution after doubling height and width."""

    in_channels: int
    out_channels: int


LayerSize = StemSize | ResnetSize | TransformerSize | DownsampleSize | UpsampleSize
BlockSizes = tuple[LayerSize, ...]


@dataclass(frozen=True)
class UNetSizes:
    """Everything needed to build the U-Net; blocks in the order and with the layer positions of the checkpoint's names."""

    in_channels: int
    out_channels: int
    model_channels: int
    time_dim: int
    vector_dim: int
    context_dim: int
    input_blocks: tuple[BlockSizes, ...]
    middle_block: BlockSizes
    output_blocks: tuple[BlockSizes, ...]
    norm_groups: int = 32


@dataclass(frozen=True)
class TextEncoderSizes:
    """Everything needed to build one CLIP text encoder; `projection_dim` 0 means it has no projection."""

    width: int
    layers: int
    heads: int
    mlp_dim: int
    projection_dim: int
    activation: str
    vocabulary: int = 49408
    positions: int = 77

    @classmethod
    def by_convention(cls, width: int, layers: int, activation: str, projection_dim: int = 0) -> "TextEncoderSizes":
        """Return the sizes of an encoder with heads of 64 (or what the width allows) and an MLP four times as wide."""
        return cls(width, layers, width // math.gcd(width, 64), 4 * width, projection_dim, activation)


@dataclass(frozen=True)
class VaeSizes:
    """Everything needed to build the VAE; `widths` per level, outermost first."""

    widths: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    image_channels: int = 3
    norm_groups: int = 32
    scaling_factor: float = 0.13025


@dataclass(frozen=True)
class SdxlSizes:
    """The sizes of all parts; the defaults are those of SDXL 1.0."""

    unet: UNetSizes = field(default_factory=lambda: plan_unet())
    te1: TextEncoderSizes = field(default_factory=lambda: TextEncoderSizes(768, 12, 12, 3072, 0, "quick_gelu"))
    te2: TextEncoderSizes = field(default_factory=lambda: TextEncoderSizes(1280, 32, 20, 5120, 1280, "gelu"))
    vae: VaeSizes = field(default_factory=lambda: VaeSizes((128, 256, 512, 512), 2, 4))

    @property
    def size_dim(self) -> int:
        """The width of one size number's embedding (256 in SDXL): six of them follow the pooled text in the U-Net's vector."""
        return (self.unet.vector_dim - self.te2.projection_dim) // 6


def plan_unet(
    model_channels: int = 320,
    channel_mult: Sequence[int] = (1, 2, 4),
    depth: Sequence[int] = (0, 2, 10),
    context_dim: int = 2048,
    vector_dim: int = 2816,
    residual_blocks: int = 2,
    latent_channels: int = 4,
) -> UNetSizes:
    """Lay out a U-Net of the SDXL kind; the defaults are SDXL's own.

    Args:
        model_channels: width of the first level, a multiple of 32.
        channel_mult: width of each level as a multiple of `model_channels`.
        depth: basic transformer blocks per transformer, per level; 0 means no transformer. The middle block has the last one.
        context_dim: width of the text context.
        vector_dim: width of pooled text and sizes together.
        residual_blocks: residual blocks per level on the way down; one more on the way up.
        latent_channels: channels in and out.
    """

    def level(in_channels: int, number: int) -> BlockSizes:
        width = model_channels * channel_mult[number]
        resnet = ResnetSize(in_channels, width)
        return (resnet, transformer(width, depth[number])) if depth[number] else (resnet,)

    def transformer(width: int, blocks: int) -> TransformerSize:
        return TransformerSize(width, blocks, context_dim, math.gcd(width, 64), 4 * width)

    last = len(channel_mult) - 1
    down: list[BlockSizes] = [(StemSize(latent_channels, model_channels),)]
    skips, width = [model_channels], model_channels
    for number in range(last + 1):
        for _ in range(residual_blocks):
            down.append(level(width, number))
            width = model_channels * channel_mult[number]
            skips.append(width)
        if number < last:
            down.append((DownsampleSize(width, width),))
            skips.append(width)
    middle_transformer = (transformer(width, depth[last]),) if depth[last] else ()
    middle = (ResnetSize(width, width), *middle_transformer, ResnetSize(width, width))
    up: list[BlockSizes] = []
    for number in reversed(range(last + 1)):
        for index in range(residual_blocks + 1):
            block = level(width + skips.pop(), number)
            width = model_channels * channel_mult[number]
            up.append((*block, UpsampleSize(width, width)) if number and index == residual_blocks else block)
    return UNetSizes(
        latent_channels,
        latent_channels,
        model_channels,
        4 * model_channels,
        vector_dim,
        context_dim,
        tuple(down),
        middle,
        tuple(up),
    )


def unet_sizes(shapes: Shapes, metadata: Mapping[str, str]) -> UNetSizes:
    """Read the U-Net's sizes from its tensors by walking its blocks, so that pruned models are covered.

    Args:
        shapes: U-Net tensors under their checkpoint names, without prefix.
        metadata: the file's metadata.

    Raises:
        KeyError: a tensor that every such U-Net has is missing; the argument is its name.
    """
    contexts = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    head_dim = metadata.get("arch.unet.head_dim")

    def blocks(group: str) -> tuple[BlockSizes, ...]:
        count = 1 + max((int(m[1]) for name in shapes if (m := re.match(rf"{group}\.(\d+)\.", name))), default=-1)
        return tuple(_block_sizes(shapes, f"{group}.{index}.", head_dim) for index in range(count))

    return UNetSizes(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        model_channels=shapes["time_embed.0.weight"][1],
        time_dim=shapes["time_embed.0.weight"][0],
        vector_dim=shapes["label_emb.0.0.weight"][1],
        context_dim=max(contexts, default=0),
        input_blocks=blocks("input_blocks"),
        middle_block=_block_sizes(shapes, "middle_block.", head_dim),
        output_blocks=blocks("output_blocks"),
        norm_groups=int(metadata.get("arch.norm_groups", 32)),
    )


def _block_sizes(shapes: Shapes, prefix: str, head_dim: str | None) -> BlockSizes:
    """Read the layers `<prefix>0`, `<prefix>1` … by what their tensors are called."""
    layers: list[LayerSize] = []
    while any(name.startswith(f"{prefix}{len(layers)}.") for name in shapes):
        layers.append(_layer_sizes(shapes, f"{prefix}{len(layers)}.", head_dim))
    return tuple(layers)


def _layer_sizes(shapes: Shapes, at: str, head_dim: str | None) -> LayerSize:
    if f"{at}in_layers.2.weight" in shapes:
        out_channels, in_channels = shapes[f"{at}in_layers.2.weight"][:2]
        return ResnetSize(in_channels, out_channels)
    if f"{at}proj_in.weight" in shapes:
        first = f"{at}transformer_blocks.0."
        channels, inner_dim = shapes[f"{first}ff.net.2.weight"]
        depth = sum(1 for name in shapes if name.startswith(at) and name.endswith("attn1.to_q.weight"))
        context_dim = shapes[f"{first}attn2.to_k.weight"][1]
        return TransformerSize(channels, depth, context_dim, int(head_dim or math.gcd(channels, 64)), inner_dim)
    for name, kind in (("op.weight", DownsampleSize), ("conv.weight", UpsampleSize), ("weight", StemSize)):
        if at + name in shapes:
            out_channels, in_channels = shapes[at + name][:2]
            size: LayerSize = kind(in_channels, out_channels)
            return size
    raise KeyError(f"{at}in_layers.2.weight")


def text_encoder_sizes(shapes: Shapes, metadata: Mapping[str, str], name: str, activation: str) -> TextEncoderSizes:
    """Read a text encoder's sizes from its tensors.

    Args:
        shapes: tensors under transformers names, starting with `text_model.`.
        metadata: the file's metadata.
        name: "te1" or "te2", as in `arch.te1.heads`.
        activation: the convention of this encoder's place, "quick_gelu" or "gelu".

    Raises:
        KeyError: a tensor that every text encoder has is missing; the argument is its name.
    """
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return TextEncoderSizes(
        width=width,
        layers=sum(1 for key in shapes if key.endswith(".self_attn.q_proj.weight")),
        heads=int(metadata.get(f"arch.{name}.heads", width // math.gcd(width, 64))),
        mlp_dim=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        projection_dim=shapes["text_projection.weight"][0] if name == "te2" else 0,
        activation=metadata.get(f"arch.{name}.act", activation),
        vocabulary=vocabulary,
        positions=shapes["text_model.embeddings.position_embedding.weight"][0],
    )


def vae_sizes(shapes: Shapes, metadata: Mapping[str, str]) -> VaeSizes:
    """Read the VAE's sizes from its tensors.

    Args:
        shapes: tensors under diffusers names.
        metadata: the file's metadata.

    Raises:
        KeyError: a tensor that every VAE has is missing; the argument is its name.
    """
    levels = 1 + max(int(m[1]) for name in shapes if (m := re.match(r"encoder\.down_blocks\.(\d+)\.", name)))
    return VaeSizes(
        widths=tuple(shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)),
        layers_per_block=sum(1 for name in shapes if re.match(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight", name)),
        latent_channels=shapes["decoder.conv_in.weight"][1],
        image_channels=shapes["encoder.conv_in.weight"][1],
        norm_groups=int(metadata.get("arch.vae.norm_groups", 32)),
        scaling_factor=float(metadata.get("arch.vae.scaling_factor", 0.13025)),
    )
