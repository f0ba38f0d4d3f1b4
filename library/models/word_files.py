"""Files of learned words: for each text encoder a tensor of vectors, (n, width)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.files.tensors import open_tensors, save_tensors, to_save
from library.options.errors import UserError


def read_word(path: str | Path, keys: Sequence[str], widths: Sequence[int]) -> list[Tensor]:
    """Return the vectors of a learned word for each text encoder, (n, width) float32.

    Args:
        path: a safetensors or PyTorch file.
        keys: the tensors' names, in the encoders' order.
        widths: of the encoders.

    Raises:
        UserError: the file cannot be read, or is of another kind of model.
    """
    file = open_tensors(path)
    if missing := [key for key in keys if key not in file]:
        raise UserError(
            f"{path} holds no word for this model: it has no {' and no '.join(missing)} "
            f"but {', '.join(sorted(file)[:3]) or 'nothing'}. "
            "Embeddings of other models, such as SD 1.5, do not fit."
        )
    rows = [file[key].float() for key in keys]
    shapes = [tuple(row.shape) for row in rows]
    if any(row.ndim != 2 or len(row) != len(rows[0]) or row.shape[1] != width for row, width in zip(rows, widths, strict=True)):
        wanted = ", ".join(f"{key} (n, {width})" for key, width in zip(keys, widths, strict=True))
        raise UserError(f"{path} holds no word for this model: its tensors are {shapes}, and {wanted} are needed.")
    return rows


def save_word(path: str | Path, rows: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
    """Write a learned word atomically.

    Args:
        path: `.safetensors`, or with any other extension a PyTorch pickle without metadata.
        rows: (n, width) by their names in the file.
        dtype: of the saved vectors; None keeps their own.
        metadata: of a safetensors file.

    Raises:
        UserError: the disk is full or the folder not writable.
    """
    save_tensors(path, to_save(rows, dtype), metadata)
