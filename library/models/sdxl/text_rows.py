"""Rows of 77 tokens, and what both text encoders make of them.

Shapes: B prompts, n rows of each, D width.
"""

import torch
from torch import Tensor, nn

BEGIN_ID, END_ID = 49406, 49407


def text_body(encoder: nn.Module) -> nn.Module:
    """Return the module that holds `embeddings`, `encoder` and `final_layer_norm`; some versions of transformers wrap it."""
    body: nn.Module = getattr(encoder, "text_model", encoder)
    return body


def merge_rows(states: Tensor) -> Tensor:
    """Join the states of a long prompt's rows: the first begin token, 75 tokens of each row, the last row's end token.

    Args:
        states: (B, n, 77, D).

    Returns:
        (B, 75n + 2, D).
    """
    return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)
