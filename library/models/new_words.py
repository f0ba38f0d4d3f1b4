"""Words that a model learns besides its vocabulary (textual inversion, Gal et al. 2022): their names, vectors and files.

A word stands for one or more vectors, one token each. Its vectors live beside the frozen table of the vocabulary, so that
gradients and optimizer states are those of the new rows alone.

Shapes: n vectors of a word, R new rows of all words, V size of the vocabulary, D width of a text encoder.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NewWord:
    """A word and how many vectors it has."""

    text: str
    num_vectors: int = 1

    @property
    def names(self) -> list[str]:
        """The names of its vectors: `word`, `word1`, `word2`, ..."""
        return [self.text, *(f"{self.text}{number}" for number in range(1, self.num_vectors))]


class WordFinder:
    """Finds new words in a text; each stands for itself only, not inside a longer word.

    Args:
        words: with the number of the first row of each counted on from those before it.
        first_id: token id of the first new row, the size of the vocabulary.
    """

    def __init__(self, words: Sequence[NewWord], first_id: int) -> None:
        self._ids: dict[str, list[int]] = {}
        for word in words:
            ids = list(range(first_id, first_id + word.num_vectors))
            self._ids |= {name.lower(): [number] for name, number in zip(word.names, ids, strict=True)}
            self._ids[word.text.lower()] = ids
            first_id += word.num_vectors
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile(_standing_alone("|".join(map(re.escape, longest_first)))) if words else None

    def split(self, text: str) -> list[str | list[int]]:
        """Split a text in lower case into what the vocabulary knows and the token ids of new words."""
        if self._pattern is None:
            return [text]
        pieces: list[str | list[int]] = []
        for number, piece in enumerate(self._pattern.split(text)):
            if piece:
                pieces.append(self._ids[piece] if number % 2 else piece)
        return pieces


class ExtendedEmbedding(nn.Module):
    """A table of the vocabulary with new rows behind it.

    Args:
        table: (V, D), as it is; not a part of this module's own state once it is frozen elsewhere.
        rows: (R, D) new rows, of any floating-point type.
    """

    def __init__(self, table: nn.Embedding, rows: Tensor) -> None:
        super().__init__()
        self.table = table
        self.rows = nn.Parameter(rows, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The vocabulary's own table (V, D); its type and device are those of the encoder."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors (…, D) of token ids (…), in the type of the table."""
        size = self.table.num_embeddings
        known = self.table(ids.clamp_max(size - 1))
        new = F.embedding((ids - size).clamp_min(0), self.rows).to(known.dtype)
        return torch.where((ids >= size)[..., None], new, known)


def mentions(text: str, word: str) -> bool:
    """Say whether a word stands in a text, in whatever case, and not as a part of a longer word."""
    return re.search(_standing_alone(re.escape(word)), text, re.IGNORECASE) is not None


def _standing_alone(pattern: str) -> str:
    return rf"(?<!\w)({pattern})(?!\w)"


def taken_names(word: NewWord, vocabulary: Iterable[str]) -> list[str]:
    """Return those names of a word's vectors that the vocabulary has, with or without the mark of a word's end."""
    known: Mapping[str, object] | frozenset[str] = vocabulary if isinstance(vocabulary, Mapping) else frozenset(vocabulary)
    return [name for name in word.names if name.lower() in known or f"{name.lower()}</w>" in known]
