"""Read and atomically write safetensors files with their metadata."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from library.files.atomic import atomic_write
from library.files.safetensors_layout import DTYPES, TensorInfo, data_chunks, header_bytes, stored_info
from library.options.errors import UserError

_LARGEST_HEADER = 100_000_000
"""The limit of the safetensors library in bytes; a larger number means that the file is something else."""

_FOREIGN_STARTS = (
    (b"PK\x03\x04", "a PyTorch pickle file; rename it to .ckpt or .pt"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"<", "a web page, probably of a failed download; download the file again"),
)


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


class _WholeFile:
    """The data part of a safetensors file, read at once; tensors are views of it."""

    def __init__(self, path: Path, data_start: int, infos: Mapping[str, TensorInfo], begins: Mapping[str, int]) -> None:
        self._infos, self._begins = infos, begins
        with path.open("rb") as file:
            file.seek(data_start)
            self._data = torch.frombuffer(bytearray(file.read()) or bytearray(1), dtype=torch.uint8)

    def get_tensor(self, name: str) -> Tensor:
        dtype, shape = self._infos[name]
        begin = self._begins[name]
        raw = self._data[begin : begin + torch.Size(shape).numel() * dtype.itemsize]
        aligned = raw if begin % dtype.itemsize == 0 else raw.clone()
        return aligned.view(dtype).reshape(shape)


def read_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return each tensor's dtype and shape, and the metadata, without reading any tensor.

    Raises:
        UserError: the file is missing, cut short or no safetensors file.
    """
    infos, metadata, _, _ = _parse(Path(path))
    return infos, metadata


def open_safetensors(path: str | Path, mmap: bool = True) -> TensorFile:
    """Open a file whose tensors are read when they are asked for.

    Args:
        path: a `.safetensors` file.
        mmap: tensors share memory with the file until they are written to. False reads the whole file at once, which is faster
            on slow and remote file systems and takes its size in memory.

    Raises:
        UserError: the file is missing, cut short or no safetensors file.
    """
    infos, metadata, begins, data_start = _parse(Path(path))
    if mmap:
        try:
            return TensorFile(path, infos, metadata, safe_open(str(path), framework="pt", device="cpu"))
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}). Download or copy it again.") from error
    return TensorFile(path, infos, metadata, _WholeFile(Path(path), data_start, infos, begins))


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
    if not path.is_file():
        raise UserError(f"{path} is a folder, not a file." if path.is_dir() else f"{path} does not exist. Check the path.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _LARGEST_HEADER:
            raise _not_safetensors(path, start + file.read(32))
        text = file.read(length)
    if len(text) < length:
        raise _cut_short(path, size, None) if text.startswith(b"{") else _not_safetensors(path, start + text[:32])
    try:
        header = json.loads(text)
        metadata = {str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()}
        infos = {name: TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()}
        begins = {name: int(entry["data_offsets"][0]) for name, entry in header.items()}
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _not_safetensors(path, start + text[:32]) from error
    if 8 + length + end > size:
        raise _cut_short(path, size, 8 + length + end)
    return infos, metadata, begins, 8 + length


def _cut_short(path: Path, size: int, expected: int | None) -> UserError:
    of = "" if expected is None else f" of {expected:,}"
    return UserError(f"{path} is cut short: it has {size:,}{of} bytes. Download or copy it again.")


def _not_safetensors(path: Path, start: bytes) -> UserError:
    if not start:
        return UserError(f"{path} is empty. Download or copy it again.")
    for signature, what in _FOREIGN_STARTS:
        if start.startswith(signature):
            return UserError(f"{path} is not a safetensors file but {what}.")
    return UserError(f"{path} is not a safetensors file, or it is damaged: its header cannot be read. Download or copy it again.")
