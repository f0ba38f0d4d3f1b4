"""Weighted and long prompts for SDXL's two text encoders: runs of text to rows of token ids, hidden states times weights.

Serves generation, sample images and weighted captions; they differ in `PromptStyle` alone.

Shape legend: B texts, n rows of 77 positions each (begin, 75 tokens, end), L positions of a whole text, D features.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from library.models.family import TextCond, Tokens
from library.models.prompt_weights import CHUNK_TOKENS, PromptStyle, parse_prompt_weights
from library.models.sdxl.text_rows import merge_rows
from library.models.sdxl.tokenizer import PAD_ID_1, PAD_ID_2, ClipBpe, make_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Row:
    """Up to 75 token ids and the weight of each."""

    ids: list[int]
    weights: list[float]


def encode_prompts(
    bpe: ClipBpe, encode_text: Callable[[Tokens], TextCond], texts: Sequence[str], style: PromptStyle
) -> list[TextCond]:
    """Encode the texts of one picture, all to the same length.

    The pooled vector is that of a text's first row, without weights.

    Args:
        bpe: the tokenizer.
        encode_text: runs the encoders on rows of ids.
        texts: the prompt, and the negative prompt where there is one.
        style: how weights and length are treated.

    Returns:
        One conditioning per text, each with a batch axis of 1; L is 77 n or 75 n + 2.
    """
    tokens, weights = tokenize_weighted(bpe, texts, style)
    if style.keep_chunk_borders:
        num_rows = tokens["ids1"].shape[1]
        row_cond = encode_text({key: ids.flatten(0, 1)[:, None] for key, ids in tokens.items()})
        by_row = {key: state.unflatten(0, (len(texts), num_rows)) for key, state in row_cond.items()}
        cond = {key: state[:, 0] if key == "pool2" else state.flatten(1, 2) for key, state in by_row.items()}
    else:
        cond = encode_text(tokens)
    cond = apply_weights(cond, weights, keep_mean=style.keep_mean)
    return [{key: state[i : i + 1] for key, state in cond.items()} for i in range(len(texts))]


def tokenize_weighted(bpe: ClipBpe, texts: Sequence[str], style: PromptStyle) -> tuple[Tokens, Tensor]:
    """Turn weighted texts into token ids and the weight of every position of the hidden states.

    Returns:
        Token ids `ids1` and `ids2`, int64 (B, n, 77); weights, float32 (B, L), which are 1 at begin, end and padding.
    """
    cut = [_rows(bpe, text, style) for text in texts]
    num_rows = style.max_chunks if style.always_max_chunks else max(len(rows) for rows in cut)
    full = [rows + [_Row([], [])] * (num_rows - len(rows)) for rows in cut]
    tokens = {
        key: torch.tensor([[make_rows(row.ids, 1, pad_id)[0] for row in rows] for rows in full])
        for key, pad_id in (("ids1", PAD_ID_1), ("ids2", PAD_ID_2))
    }
    weights = torch.tensor([[_padded_weights(row) for row in rows] for rows in full])
    return tokens, weights.flatten(1) if style.keep_chunk_borders else merge_rows(weights[..., None]).squeeze(-1)


def apply_weights(cond: TextCond, weights: Tensor, *, keep_mean: bool) -> TextCond:
    """Multiply the hidden states of every text by the weights of its tokens; gradients flow.

    Args:
        cond: `hidden1` and `hidden2` (B, L, D), where they are present, and whatever else, which stays as it is.
        weights: (B, L) float32, on the CPU.
        keep_mean: rescale each text so that the mean over L and D is what it was. Where that mean has vanished or changed its sign,
            which would blow up or turn round the text, it is left as the weights made it.
    """
    if bool((weights == 1).all()):
        return cond
    weighted = dict(cond)
    for key in ("hidden1", "hidden2"):
        if key not in cond:
            continue
        before = cond[key].float()
        after = before * weights.to(before.device)[..., None]
        if keep_mean:
            factor = before.mean((1, 2), keepdim=True) / after.mean((1, 2), keepdim=True)
            after = after * torch.where(factor.isfinite() & (factor > 0), factor, 1.0)
        weighted[key] = after.to(cond[key].dtype)
    return weighted


def _rows(bpe: ClipBpe, text: str, style: PromptStyle) -> list[_Row]:
    """Cut a text after every 75 tokens and at every BREAK; at least one row, at most `style.max_chunks`."""
    rows = [_Row([], [])]
    for run in parse_prompt_weights(text, breaks=style.breaks):
        if run.is_break:
            rows.append(_Row([], []))
            continue
        for token_id in bpe.encode(run.text):
            if len(rows[-1].ids) == CHUNK_TOKENS:
                rows.append(_Row([], []))
            rows[-1].ids.append(token_id)
            rows[-1].weights.append(run.weight)
    if num_cut := sum(len(row.ids) for row in rows[style.max_chunks :]):
        _warn_of_cut(text, style.max_chunks, num_cut)
    return rows[: style.max_chunks]


@lru_cache(maxsize=10_000)  # once for each text: captions come again in every epoch
def _warn_of_cut(text: str, max_chunks: int, num_cut: int) -> None:
    logger.warning(
        f'A prompt is longer than {max_chunks} × {CHUNK_TOKENS} tokens; its last {num_cut} are not used: "{text}". '
        "More are read with --max_embeddings_multiples when drawing, with --max_token_length when training."
    )


def _padded_weights(row: _Row) -> list[float]:
    return [1.0, *row.weights, *[1.0] * (CHUNK_TOKENS - len(row.weights) + 1)]
