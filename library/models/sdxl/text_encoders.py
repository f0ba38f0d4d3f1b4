"""The two text encoders: CLIP ViT-L/14 (TE1) and OpenCLIP ViT-bigG/14 (TE2), as transformers models.

The forward passes are ours: SDXL wants the states before the last layer, which TE1 therefore does not compute, and the pooled
output at the first end token rather than at the largest token id.

Shapes: N rows of 77 tokens, D width, P projection width.
"""

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.models.sdxl.sizes import TextEncoderSizes
from library.models.sdxl.text_rows import BEGIN_ID, END_ID, text_body


class ClipTextEncoder(CLIPTextModel):
    """TE1."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map input_ids (N, 77) to the states before the last layer (N, 77, D), not normed."""
        body = text_body(self)
        return _run_layers(body, body.embeddings(input_ids), slice(None, -1))  # type: ignore[operator]  # a plain Module to mypy


class OpenClipTextEncoder(CLIPTextModelWithProjection):
    """TE2."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Map input_ids (N, 77) to the states before the last layer (N, 77, D), not normed, and the pooled output (N, P)."""
        body = text_body(self)
        penultimate = _run_layers(body, body.embeddings(input_ids), slice(None, -1))  # type: ignore[operator]
        last = body.final_layer_norm(_run_layers(body, penultimate, slice(-1, None)))  # type: ignore[operator]
        # argmax of the mask is the first end token, or 0 where there is none.
        end = (input_ids == END_ID).int().argmax(dim=-1)
        pooled = last[torch.arange(len(last), device=last.device), end]
        return penultimate, self.text_projection(pooled.to(self.text_projection.weight.dtype)).to(last.dtype)


def _run_layers(body: nn.Module, hidden: Tensor, which: slice) -> Tensor:
    """Run a range of the layers, causally and without a padding mask."""
    for layer in body.encoder.layers[which]:  # type: ignore[union-attr, index]
        hidden = layer(hidden, attention_mask=None, is_causal=True)
    return hidden


def build_text_encoder(sizes: TextEncoderSizes) -> ClipTextEncoder | OpenClipTextEncoder:
    """Build TE1, or TE2 where there is a projection, with all parameters on the meta device."""
    config = CLIPTextConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_dim,
        projection_dim=sizes.projection_dim or sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.positions,
        hidden_act=sizes.activation,
        layer_norm_eps=1e-5,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=1,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        encoder = OpenClipTextEncoder(config) if sizes.projection_dim else ClipTextEncoder(config)
    # Not in any file, hence not filled later.
    text_body(encoder).embeddings.position_ids = torch.arange(sizes.positions)[None]  # type: ignore[union-attr]
    return encoder
