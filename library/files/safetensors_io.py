"""Read and atomically write safetensors files with their metadata."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from library.files.atomic import atomic_write
from library.files.safetensors_header import parse_header
from library.files.safetensors_layout import DTYPES, TensorInfo, data_chunks, header_bytes, stored_info
from library.options.errors import UserError


class TensorFile(Mapping[str, Tensor]):
    """A file's tensors by name, on the CPU, each read when it is asked for.

    Also a context manager; leaving it lets go of the file, tensors already read stay valid.
    """

    path: Path
    metadata: dict[str, str]
    infos: dict[str, TensorInfo]
    """Dtype and shape of every tensor, known without reading any."""

    def __init__(self, path: str | Path, infos: dict[str, TensorInfo], metadata: dict[str, str], source: Any) -> None:
        """Take `source`, which gives a tensor for a name through `get_tensor`."""
        self.path, self.infos, self.metadata, self._source = Path(path), infos, metadata, source

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.infos:
            raise KeyError(name)
        if self._source is None:
            raise ValueError(f"{self.path} was closed already")
        tensor: Tensor = self._source.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def close(self) -> None:
        """Let go of the file; tensors that were read stay valid."""
        self._source = None

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _ReadFile:
    """A safetensors file that is read like any other, a tensor at a time."""

    def __init__(self, path: Path, data_start: int, infos: Mapping[str, TensorInfo], begins: Mapping[str, int]) -> None:
        self._path, self._data_start, self._infos, self._begins = path, data_start, infos, begins
        self._file = path.open("rb", buffering=0)
        self._lock = Lock()  # between the seek and the read

    def get_tensor(self, name: str) -> Tensor:
        dtype, shape = self._infos[name]
        tensor = torch.empty(shape, dtype=dtype)
        left = tensor.reshape(-1).view(torch.uint8).numpy().data
        with self._lock:
            self._file.seek(self._data_start + self._begins[name])
            while len(left):
                count = self._file.readinto(left)
                if not count:
                    raise UserError(f"{self._path} got shorter while it was read: {name} is not in it any more. Copy it again.")
                left = left[count:]
        return tensor


def open_safetensors(path: str | Path, mmap: bool = True) -> TensorFile:
    """Open a file whose tensors are read when they are asked for.

    Args:
        path: a `.safetensors` file.
        mmap: tensors share memory with the file until they are written to. False reads each tensor like any file, which is faster
            on some slow and remote file systems.

    Raises:
        UserError: the file is missing, cut short or no safetensors file.
    """
    infos, metadata, begins, data_start = _parse(Path(path))
    if mmap:
        try:
            return TensorFile(path, infos, metadata, safe_open(str(path), framework="pt", device="cpu"))
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}). Download or copy it again.") from error
    return TensorFile(path, infos, metadata, _ReadFile(Path(path), data_start, infos, begins))


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write tensors of any device atomically; only one of them at a time is copied.

    Args:
        path: the file to make or replace.
        tensors: by name.
        metadata: strings only.
        dtype: what floating-point tensors are converted to while they are written; None keeps each as it is.

    Raises:
        UserError: the disk is full or the folder not writable; the file that was there before stays whole.
    """
    infos = {name: stored_info(tensor, dtype) for name, tensor in tensors.items()}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(header_bytes(infos, metadata))
        for chunk in data_chunks(tensors, dtype):
            file.write(chunk)


def _parse(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str], dict[str, int], int]:
    """Return infos, metadata, each tensor's begin within the data part, and where the data part begins in the file."""
    tensors, metadata, data_start = parse_header(path)
    if unknown := {tensor.dtype for tensor in tensors.values()} - DTYPES.keys():
        raise UserError(f"{path} has tensors of a number type that is not known here: {', '.join(sorted(unknown))}.")
    infos = {name: TensorInfo(DTYPES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    return infos, metadata, {name: tensor.begin for name, tensor in tensors.items()}, data_start
