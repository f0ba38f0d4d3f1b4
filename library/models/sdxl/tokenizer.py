"""The tokenizers of both text encoders, built from the vocabulary that open_clip ships: nothing is ever downloaded.

Both encoders share one vocabulary; they differ in what fills a row after its end token.
"""

import gzip
import importlib.util
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.models.new_words import NewWord, WordFinder, taken_names
from library.models.sdxl.text_rows import BEGIN_ID, END_ID
from library.options.errors import UserError

log = logging.getLogger(__name__)

ROW_LENGTH = 77
_ROW_TOKENS = ROW_LENGTH - 2
_NUM_MERGES = 48894
_CACHE_FOLDER = "openai_clip-vit-large-patch14"
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What is split further each by itself, in the words of Radford et al. 2021 (CLIP)."""

PAD_ID_1, PAD_ID_2 = END_ID, 0
"""What fills rows of TE1 and of TE2. 0 is also the ordinary symbol `!`, so it never becomes a special token of the tokenizer."""


class ClipBpe:
    """Text to token ids, without begin, end and padding.

    Args:
        vocabulary: ids of symbols and words.
        merges: in their order.
        words: that are no part of the vocabulary, spelled as texts are after cleaning; their tokens follow on it, in their order.
    """

    def __init__(self, vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], words: Sequence[NewWord] = ()) -> None:
        self._vocabulary, self._merges = vocabulary, merges
        self._tokenizer = _clip_tokenizer(vocabulary, merges)
        self._finder = WordFinder(words, first_id=len(vocabulary)) if words else None

    def with_words(self, words: Sequence[NewWord]) -> "ClipBpe":
        """Return this tokenizer with words of one's own in place of those it had."""
        return ClipBpe(self._vocabulary, self._merges, [_as_found(word) for word in words])

    def taken(self, word: NewWord) -> list[str]:
        """Return those names of a word's vectors that mean something already."""
        return taken_names(_as_found(word), self._vocabulary)

    def encode(self, text: str) -> list[int]:
        """Return the ids of all tokens of `text`.

        The text is cleaned as OpenAI did for training: ftfy repairs it, whitespace collapses, case is lost. Without ftfy, curly
        quotes, ligatures and full-width letters would get other ids.
        """
        cleaned = _cleaned(text)
        if self._finder is None:
            return self._known(cleaned)
        return [i for piece in self._finder.split(cleaned) for i in (self._known(piece) if isinstance(piece, str) else piece)]

    def _known(self, cleaned: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(cleaned, add_special_tokens=False).ids
        return ids

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each of many texts has."""
        if not texts:
            return []
        if self._finder is not None:
            return [len(self.encode(text)) for text in texts]
        cleaned = [_cleaned(text) for text in texts]
        return [len(found.ids) for found in self._tokenizer.encode_batch(cleaned, add_special_tokens=False)]


def _clip_tokenizer(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]) -> Any:
    """Return what transformers' CLIPTokenizer is made of, without the seconds that importing transformers takes."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges), unk_token=_END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (_BEGIN, _END)])
    return tokenizer


def _cleaned(text: str) -> str:
    import ftfy

    return re.sub(r"\s+", " ", ftfy.fix_text(text)).strip().lower()


def _as_found(word: NewWord) -> NewWord:
    """Spell a word as it stands in a text that was cleaned: in full-width letters, for example, it would not be found."""
    return replace(word, text=_cleaned(word.text))


@lru_cache(maxsize=2)
def load_bpe(cache_dir: str | None = None) -> ClipBpe:
    """Load the tokenizer.

    Args:
        cache_dir: a folder that may hold `openai_clip-vit-large-patch14/` with vocab.json and merges.txt, or tokenizer.json; the
            vocabulary of open_clip is used where it does not.

    Raises:
        UserError: open_clip is not installed, or a file of the folder is damaged.
    """
    folder = Path(cache_dir) / _CACHE_FOLDER if cache_dir else None
    if folder is None or not folder.is_dir():
        if folder is not None:
            log.info("There is no folder %s: the vocabulary that comes with open_clip is used; nothing is kept there.", folder)
        return ClipBpe(*open_clip_vocabulary())
    try:
        return ClipBpe(*_folder_vocabulary(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The tokenizer in {folder} cannot be read ({error}). Remove the folder, or leave out --tokenizer_cache_dir: "
            "the vocabulary that comes with open_clip is the same."
        ) from error


def _folder_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if (folder / "vocab.json").is_file():
        vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")[1:]
        return vocabulary, [_pair(line) for line in lines if line]
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    return model["vocab"], [_pair(merge) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]


def open_clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's vocabulary (symbols, the same at word ends, merges, begin and end) and its merges, as OpenAI published them.

    Raises:
        UserError: open_clip, which ships them, is not installed.
    """
    # The package is found, not imported: importing it takes seconds.
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise UserError("The tokenizer's vocabulary comes with open_clip, which is not installed: `pip install open_clip_torch`.")
    path = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = [_pair(line) for line in lines[1 : _NUM_MERGES + 1]]
    symbols = _byte_symbols()
    words = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), _BEGIN, _END]
    return {word: number for number, word in enumerate(words)}, merges


def _pair(line: str) -> tuple[str, str]:
    left, right = line.split(" ")
    return left, right


def _byte_symbols() -> list[str]:
    """The 256 characters that stand for bytes, in vocabulary order: printable ones for themselves, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def make_rows(ids: Sequence[int], num_rows: int, pad_id: int) -> list[list[int]]:
    """Lay token ids out in rows of 77 with begin and end tokens; what does not fit is cut off.

    Args:
        ids: without begin and end.
        num_rows: 1, 2 or 3.
        pad_id: fills a row after its end token.
    """
    rows = []
    for start in range(0, num_rows * _ROW_TOKENS, _ROW_TOKENS):
        row = [BEGIN_ID, *ids[start : min(start + _ROW_TOKENS, num_rows * _ROW_TOKENS)], END_ID]
        rows.append(row + [pad_id] * (ROW_LENGTH - len(row)))
    return rows


def tokenize(bpe: ClipBpe, texts: Sequence[str], max_token_length: int) -> tuple[Tensor, Tensor]:
    """Return the ids of B texts for TE1 and TE2, int64 (B, n, 77) each, with n = max_token_length / 75 rows."""
    num_rows = max_token_length // _ROW_TOKENS
    encoded = [bpe.encode(text) for text in texts]
    return (
        torch.tensor([make_rows(ids, num_rows, PAD_ID_1) for ids in encoded], dtype=torch.int64).reshape(-1, num_rows, ROW_LENGTH),
        torch.tensor([make_rows(ids, num_rows, PAD_ID_2) for ids in encoded], dtype=torch.int64).reshape(-1, num_rows, ROW_LENGTH),
    )
