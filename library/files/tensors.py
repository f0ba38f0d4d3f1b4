"""Open a file of tensors whatever its format."""

from pathlib import Path

from torch import Tensor

from library.files.pickle_io import load_pickle_checkpoint, metadata_of, state_dict_of
from library.files.safetensors_io import TensorFile, open_safetensors
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
