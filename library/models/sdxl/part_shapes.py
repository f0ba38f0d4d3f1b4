"""The shapes of all tensors of the text encoders and the VAE, by the names of `Checkpoint.parts`.

They are those of the modules that transformers and diffusers make, known here without these packages: importing both takes longer
than anything else that a training run does before its first step, and one with all caches needs neither.
"""

from collections.abc import Iterator
from itertools import chain, pairwise

from library.models.sdxl.sizes import TextEncoderSizes, VaeSizes

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


def text_encoder_shapes(sizes: TextEncoderSizes) -> dict[str, Shape]:
    """Return the shapes of TE1's tensors, or of TE2's where there is a projection."""
    return dict(_text_encoder(sizes))


def vae_shapes(sizes: VaeSizes) -> dict[str, Shape]:
    """Return the shapes of the VAE's tensors."""
    return dict(chain(_vae_half("encoder", sizes), _vae_half("decoder", sizes), _vae_between(sizes)))


def _text_encoder(sizes: TextEncoderSizes) -> Named:
    width, mlp = sizes.width, sizes.mlp_dim
    yield "text_model.embeddings.token_embedding.weight", (sizes.vocabulary, width)
    yield "text_model.embeddings.position_embedding.weight", (sizes.positions, width)
    for number in range(sizes.layers):
        layer = f"text_model.encoder.layers.{number}."
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _product(f"{layer}self_attn.{projection}", width, width)
        yield from _product(f"{layer}mlp.fc1", mlp, width)
        yield from _product(f"{layer}mlp.fc2", width, mlp)
        yield from _norm(f"{layer}layer_norm1", width)
        yield from _norm(f"{layer}layer_norm2", width)
    yield from _norm("text_model.final_layer_norm", width)
    if sizes.projection_dim:
        yield "text_projection.weight", (sizes.projection_dim, width)


def _vae_half(half: str, sizes: VaeSizes) -> Named:
    """Yield the tensors of the encoder, or of the decoder, whose levels run the other way and have a block more each."""
    is_encoder = half == "encoder"
    widths = sizes.widths if is_encoder else sizes.widths[::-1]
    level, sampler, more = ("down_blocks", "downsamplers", 0) if is_encoder else ("up_blocks", "upsamplers", 1)
    latents = 2 * sizes.latent_channels if is_encoder else sizes.latent_channels
    ends = (sizes.image_channels, latents) if is_encoder else (latents, sizes.image_channels)
    yield from _product(f"{half}.conv_in", widths[0], ends[0], 3, 3)
    for number, (before, width) in enumerate(pairwise((widths[0], *widths))):
        for block in range(sizes.layers_per_block + more):
            yield from _resnet(f"{half}.{level}.{number}.resnets.{block}", width if block else before, width)
        if number < len(widths) - 1:
            yield from _product(f"{half}.{level}.{number}.{sampler}.0.conv", width, width, 3, 3)
    deepest = sizes.widths[-1]
    for block in range(2):
        yield from _resnet(f"{half}.mid_block.resnets.{block}", deepest, deepest)
    attention = f"{half}.mid_block.attentions.0."
    yield from _norm(f"{attention}group_norm", deepest)
    for projection in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _product(attention + projection, deepest, deepest)
    yield from _norm(f"{half}.conv_norm_out", widths[-1])
    yield from _product(f"{half}.conv_out", ends[1], widths[-1], 3, 3)


def _vae_between(sizes: VaeSizes) -> Named:
    latents = sizes.latent_channels
    yield from _product("quant_conv", 2 * latents, 2 * latents, 1, 1)
    yield from _product("post_quant_conv", latents, latents, 1, 1)


def _resnet(name: str, before: int, after: int) -> Named:
    yield from _norm(f"{name}.norm1", before)
    yield from _product(f"{name}.conv1", after, before, 3, 3)
    yield from _norm(f"{name}.norm2", after)
    yield from _product(f"{name}.conv2", after, after, 3, 3)
    if before != after:
        yield from _product(f"{name}.conv_shortcut", after, before, 1, 1)


def _norm(name: str, width: int) -> Named:
    return _product(name, width)


def _product(name: str, outputs: int, *inputs: int) -> Named:
    """Yield a weight and the bias of its outputs."""
    yield f"{name}.weight", (outputs, *inputs)
    yield f"{name}.bias", (outputs,)
