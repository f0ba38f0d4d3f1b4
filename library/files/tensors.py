"""Open and write files of tensors whatever their format."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.files.pickle_io import load_pickle_checkpoint, metadata_of, save_pickle_checkpoint, state_dict_of
from library.files.safetensors_io import TensorFile, open_safetensors, save_safetensors
from library.files.safetensors_layout import TensorInfo


class _Loaded:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def open_tensors(path: str | Path, mmap: bool = True) -> TensorFile:
    """Open a `.safetensors` file, or else a PyTorch pickle file (its `state_dict` where it has one, with what `metadata_of` finds).

    Args:
        path: the file; its extension, in any case, decides the format.
        mmap: as in `open_safetensors`; pickle files are always mapped where their format allows it.

    Raises:
        UserError: the file is missing, cut short, or of another format than its extension says.
    """
    if Path(path).suffix.lower() == ".safetensors":
        return open_safetensors(path, mmap)
    content = load_pickle_checkpoint(path)
    tensors = state_dict_of(content)
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return TensorFile(path, infos, metadata_of(content), _Loaded(tensors))


def to_save(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return tensors as files hold them: on the CPU, without gradient, contiguous.

    Args:
        tensors: by name.
        dtype: of all of them; None keeps their own.
    """
    return {name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    """Write tensors atomically.

    Args:
        path: `.safetensors`, in any case, or with any other extension a PyTorch pickle without metadata.
        tensors: see `to_save`.
        metadata: of a safetensors file.

    Raises:
        UserError: the disk is full or the folder not writable.
    """
    if Path(path).suffix.lower() == ".safetensors":
        save_safetensors(path, tensors, metadata)
    else:
        save_pickle_checkpoint(path, tensors)
