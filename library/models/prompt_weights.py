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
    reading = _Reading()
    for token in _TOKEN.finditer(prompt):
        kind = token.lastgroup or ""
        value = token.group(kind)
        match kind:
            case "open":
                reading.open(value)
            case "close":
                reading.close(value)
            case "number":
                reading.close_with_number(value)
            case "text" if breaks:
                reading.runs += _split_at_breaks(value)
            case "text" | "literal":
                reading.add(value)
    reading.close_all()
    return _join_equal_neighbours(reading.runs) or [WeightedText("")]


def has_weights(prompt: str) -> bool:
    """Say whether a prompt is another text, or not all of the same weight, when brackets are read as weights."""
    return parse_prompt_weights(prompt) != [WeightedText(prompt)]


def without_weights(prompt: str) -> str:
    """Return the text of a prompt that is read with weights, which is what is tokenized."""
    return "".join(run.text for run in parse_prompt_weights(prompt))


_BRACKET_WEIGHTS = {"(": ROUND_WEIGHT, "[": 1 / ROUND_WEIGHT}
_OPENED_BY = {")": "(", "]": "["}


class _Reading:
    """The runs that were read so far, and where the brackets began that are still open."""

    def __init__(self) -> None:
        self.runs: list[WeightedText] = []
        self._open_at: dict[str, list[int]] = {bracket: [] for bracket in _BRACKET_WEIGHTS}

    def add(self, text: str) -> None:
        self.runs.append(WeightedText(text))

    def open(self, bracket: str) -> None:
        self._open_at[bracket].append(len(self.runs))

    def close(self, closing: str, weight: float | None = None) -> None:
        """Give what stands in the innermost bracket of a kind its weight; where none is open, the closing one is text."""
        bracket = _OPENED_BY[closing]
        if self._open_at[bracket]:
            self._multiply(self._open_at[bracket].pop(), _BRACKET_WEIGHTS[bracket] if weight is None else weight)
        else:
            self.add(closing)

    def close_with_number(self, number: str) -> None:
        """Close a round bracket with the weight that was given; a number that is no weight is text before a plain bracket."""
        weight = _number(number) if self._open_at["("] else None
        if weight is None:
            self.add(f":{number}")
        self.close(")", weight)

    def close_all(self) -> None:
        for bracket, starts in self._open_at.items():
            for start in starts:
                self._multiply(start, _BRACKET_WEIGHTS[bracket])

    def _multiply(self, start: int, factor: float) -> None:
        self.runs[start:] = [WeightedText(run.text, run.weight * factor, run.is_break) for run in self.runs[start:]]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


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
