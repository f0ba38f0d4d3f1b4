"""Weighted and long prompts for SDXL's two text encoders: runs of text to chunks of token ids, hidden states times weights.

Serves generation, sample images and weighted captions; they differ in `PromptStyle` alone.

Shape legend: B texts, n chunks, 77 positions per chunk (begin, 75 tokens, end), L positions of a whole text, D features.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.models.family import TextCond, Tokens
from library.models.prompt_weights import CHUNK_TOKENS, PromptStyle, parse_prompt_weights

logger = logging.getLogger(__name__)

_ENCODERS = (("ids1", "hidden1"), ("ids2", "hidden2"))
"""The names of each encoder's token ids and hidden states, in the family's order."""


class ClipTokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        """Return a mapping whose `input_ids` are the ids of the text."""


class TextFamily(Protocol):
    """What is needed of a family with two CLIP encoders."""

    @property
    def tokenizers(self) -> Sequence[ClipTokenizer]:
        """One per encoder."""

    def encode_text(self, tokens: Tokens, encoders: Sequence[nn.Module | None]) -> TextCond:
        """See `library.models.family.Family.encode_text`."""


@dataclass(frozen=True)
class _Chunk:
    """Up to 75 token ids and the weight of each."""

    ids: list[int]
    weights: list[float]


def encode_prompts(
    family: TextFamily, texts: Sequence[str], encoders: Sequence[nn.Module | None], style: PromptStyle
) -> list[TextCond]:
    """Encode the texts of one picture, all to the same length.

    The pooled vector is that of a text's first chunk, without weights.

    Args:
        family: whose encoders read the texts.
        texts: the prompt, and the negative prompt where there is one.
        encoders: as the family loads them.
        style: how weights and length are treated.

    Returns:
        One conditioning per text, each with a batch axis of 1; L is 77 n or 75 n + 2.
    """
    tokens, weights = tokenize_weighted(family.tokenizers, texts, style)
    if not style.keep_chunk_borders:
        cond = apply_weights(family.encode_text(tokens, encoders), weights, keep_mean=style.keep_mean)
    else:
        num_chunks = tokens["ids1"].shape[1]
        by_chunk = family.encode_text({key: ids.flatten(0, 1)[:, None] for key, ids in tokens.items()}, encoders)
        whole = {key: state.unflatten(0, (len(texts), num_chunks)) for key, state in by_chunk.items()}
        joined = {key: state[:, 0] if key == "pool2" else state.flatten(1, 2) for key, state in whole.items()}
        cond = apply_weights(joined, weights, keep_mean=style.keep_mean)
    return [{key: state[i : i + 1] for key, state in cond.items()} for i in range(len(texts))]


def tokenize_weighted(
    tokenizers: Sequence[ClipTokenizer], texts: Sequence[str], style: PromptStyle
) -> tuple[Tokens, dict[str, Tensor]]:
    """Turn weighted texts into token ids and the weight of every position of the hidden states.

    Returns:
        Token ids `ids1`, `ids2`: int64 (B, n, 77); weights `hidden1`, `hidden2`: float32 (B, L), 1 at begin, end and padding.
    """
    tokens: Tokens = {}
    weights: dict[str, Tensor] = {}
    for tokenizer, (ids_key, hidden_key) in zip(tokenizers, _ENCODERS, strict=True):
        chunked = [_chunks(tokenizer, text, style) for text in texts]
        num_chunks = style.max_chunks if style.always_max_chunks else max(len(chunks) for chunks in chunked)
        rows = [chunks + [_Chunk([], [])] * (num_chunks - len(chunks)) for chunks in chunked]
        tokens[ids_key] = torch.tensor([[_padded_ids(tokenizer, chunk) for chunk in row] for row in rows])
        by_chunk = torch.tensor([[_padded_weights(chunk) for chunk in row] for row in rows])
        weights[hidden_key] = by_chunk.flatten(1) if style.keep_chunk_borders else _without_inner_borders(by_chunk)
    return tokens, weights


def apply_weights(cond: TextCond, weights: dict[str, Tensor], *, keep_mean: bool) -> TextCond:
    """Multiply the hidden states of every text by the weights of its tokens; gradients flow.

    Args:
        cond: `hidden1`, `hidden2` (B, L, D) and whatever else, which stays as it is.
        weights: (B, L) float32 for each of the two.
        keep_mean: rescale each text so that the mean over L and D is what it was. Where that mean has vanished or changed its sign,
            which would blow up or turn round the text, it is left as the weights made it.
    """
    weighted = dict(cond)
    for key, weight in weights.items():
        if bool((weight == 1).all()):
            continue
        before = cond[key].float()
        after = before * weight.to(before.device)[..., None]
        if keep_mean:
            factor = before.mean((1, 2), keepdim=True) / after.mean((1, 2), keepdim=True)
            after = after * torch.where(factor.isfinite() & (factor > 0), factor, 1.0)
        weighted[key] = after.to(cond[key].dtype)
    return weighted


def _chunks(tokenizer: ClipTokenizer, text: str, style: PromptStyle) -> list[_Chunk]:
    """Cut a text into chunks: every 75 tokens and at every BREAK; at least one, at most `style.max_chunks`."""
    chunks = [_Chunk([], [])]
    for run in parse_prompt_weights(text, breaks=style.breaks):
        if run.is_break:
            chunks.append(_Chunk([], []))
            continue
        for token_id in tokenizer(run.text, add_special_tokens=False)["input_ids"]:
            if len(chunks[-1].ids) == CHUNK_TOKENS:
                chunks.append(_Chunk([], []))
            chunks[-1].ids.append(token_id)
            chunks[-1].weights.append(run.weight)
    if len(chunks) > style.max_chunks:
        cut = sum(len(chunk.ids) for chunk in chunks[style.max_chunks :])
        logger.warning(
            f'A prompt is longer than {style.max_chunks * CHUNK_TOKENS} tokens; its last {cut} are not used: "{text}". '
            "More are read with --max_embeddings_multiples when drawing, --max_token_length when training."
        )
    return chunks[: style.max_chunks]


def _padded_ids(tokenizer: ClipTokenizer, chunk: _Chunk) -> list[int]:
    padding = [tokenizer.pad_token_id] * (CHUNK_TOKENS - len(chunk.ids))
    return [tokenizer.bos_token_id, *chunk.ids, tokenizer.eos_token_id, *padding]


def _padded_weights(chunk: _Chunk) -> list[float]:
    return [1.0, *chunk.weights, *[1.0] * (CHUNK_TOKENS - len(chunk.weights) + 1)]


def _without_inner_borders(by_chunk: Tensor) -> Tensor:
    """Join (B, n, 77) to (B, 75 n + 2): the first begin position, 75 of every chunk, the last end position."""
    return torch.cat([by_chunk[:, 0, :1], by_chunk[:, :, 1:-1].flatten(1), by_chunk[:, -1, -1:]], dim=1)
