"""The weighting grammar of prompts and captions: `(word)` × 1.1, `[word]` ÷ 1.1, `(word:1.3)` × 1.3, `BREAK`.

One parser serves image generation, sample images and weighted captions. It knows nothing of tokens or tensors.
"""

import re
from dataclasses import dataclass

ROUND_WEIGHT = 1.1
"""What a pair of round brackets without a number multiplies by; a square pair divides by it."""

_TOKEN = re.compile(
    r"""
      \\(?P<literal>[()\[\]\\])        # an escaped bracket or backslash stands for itself
    | (?P<lone_backslash>\\)           # any other backslash is dropped
    | (?P<open>[(\[])
    | :(?P<number>[+-]?[.\d]+)\)       # the weight that closes a round bracket; no blanks, no exponent
    | (?P<close>[)\]])
    | (?P<text>[^\\()\[\]:]+|:)
    """,
    re.VERBOSE,
)
_BREAK_WORD = re.compile(r"\bBREAK\b")


@dataclass(frozen=True)
class WeightedText:
    """A run of text and what the hidden states of its tokens are multiplied by."""

    text: str
    weight: float = 1.0
    is_break: bool = False
    """The word BREAK: what follows starts in a new chunk of tokens. `text` is then "BREAK"."""


def parse_prompt_weights(prompt: str, *, breaks: bool = False) -> list[WeightedText]:
    """Split a prompt into runs of equal weight.

    Brackets nest by multiplication; an opening bracket that is never closed reaches to the end; a closing one without
    an opening one is text; so is a weight that is not a number, as in `(x:1.3.5)`.

    Args:
        prompt: the text as typed.
        breaks: whether the whole word BREAK starts a new chunk. Training captions have no such word.

    Returns:
        The runs in order, neighbours of equal weight joined; one empty run for an empty prompt.
    """
    runs: list[WeightedText] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}
    for token in _TOKEN.finditer(prompt):
        kind, value = _kind_and_text(token)
        if kind == "open":
            open_at[value].append(len(runs))
        elif kind == "number" and open_at["("] and (weight := _number(value)) is not None:
            _multiply(runs, open_at["("].pop(), weight)
        elif kind == "close" and open_at["(" if value == ")" else "["]:
            bracket = "(" if value == ")" else "["
            _multiply(runs, open_at[bracket].pop(), _bracket_weight(bracket))
        elif kind == "number":
            # No weight here: a plain closing bracket preceded by text.
            runs.append(WeightedText(f":{value}"))
            if open_at["("]:
                _multiply(runs, open_at["("].pop(), ROUND_WEIGHT)
            else:
                runs.append(WeightedText(")"))
        elif kind != "lone_backslash":
            runs.extend(_split_at_breaks(value) if breaks and kind == "text" else [WeightedText(value)])
    for bracket, starts in open_at.items():
        for start in starts:
            _multiply(runs, start, _bracket_weight(bracket))
    return _join_equal_neighbours(runs) or [WeightedText("")]


def has_weights(prompt: str) -> bool:
    """Say whether a prompt is another text, or not all of the same weight, when brackets are read as weights."""
    return parse_prompt_weights(prompt) != [WeightedText(prompt)]


def without_weights(prompt: str) -> str:
    """Return the text of a prompt that is read with weights, which is what is tokenized."""
    return "".join(run.text for run in parse_prompt_weights(prompt))


def _kind_and_text(token: re.Match[str]) -> tuple[str, str]:
    kind = token.lastgroup or ""
    return kind, token.group(kind)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _bracket_weight(bracket: str) -> float:
    return ROUND_WEIGHT if bracket == "(" else 1 / ROUND_WEIGHT


def _multiply(runs: list[WeightedText], start: int, factor: float) -> None:
    """Multiply the weights of all runs from `start` on, in place."""
    runs[start:] = [WeightedText(run.text, run.weight * factor, run.is_break) for run in runs[start:]]


def _split_at_breaks(text: str) -> list[WeightedText]:
    """Cut a text at every whole word BREAK, keeping the word as a run of its own."""
    runs = [WeightedText(piece) for piece in _BREAK_WORD.split(text)]
    return [runs[0], *(run for piece in runs[1:] for run in (WeightedText("BREAK", is_break=True), piece))]


def _join_equal_neighbours(runs: list[WeightedText]) -> list[WeightedText]:
    joined: list[WeightedText] = []
    for run in runs:
        if joined and not run.is_break and not joined[-1].is_break and joined[-1].weight == run.weight:
            joined[-1] = WeightedText(joined[-1].text + run.text, run.weight)
        else:
            joined.append(run)
    return joined


CHUNK_TOKENS = 75
"""Prompt tokens a CLIP text encoder reads at once, between its begin and end tokens."""


@dataclass(frozen=True)
class PromptStyle:
    """How a long or weighted prompt becomes conditioning."""

    max_chunks: int = 1
    """Chunks of 75 tokens a prompt may have; what is longer is cut."""
    always_max_chunks: bool = False
    """Fill short prompts up to `max_chunks`, as training does."""
    keep_chunk_borders: bool = True
    """Keep every chunk's begin and end position (77 per chunk); otherwise only the first and the last (75 per chunk, plus 2)."""
    keep_mean: bool = True
    """Scale weighted hidden states back to the mean they had without weights."""
    breaks: bool = True
    """Let the word BREAK start a new chunk."""

    @classmethod
    def of_training(cls, max_token_length: int = CHUNK_TOKENS) -> "PromptStyle":
        """Return the style captions are trained with, and sample images therefore drawn with.

        Args:
            max_token_length: 75, 150 or 225 tokens.
        """
        return cls(
            max_token_length // CHUNK_TOKENS, always_max_chunks=True, keep_chunk_borders=False, keep_mean=False, breaks=False
        )
