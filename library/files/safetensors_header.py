"""Read what a safetensors file says before its tensors, and tell files that are something else; needs no torch."""

import json
from pathlib import Path
from typing import NamedTuple

from library.options.errors import UserError

_LARGEST_HEADER = 100_000_000
"""The limit of the safetensors library in bytes; a larger number means that the file is something else."""

_FOREIGN_STARTS = (
    (b"PK\x03\x04", "a PyTorch pickle file; rename it to .ckpt or .pt"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"<", "a web page, probably of a failed download; download the file again"),
)


class StoredTensor(NamedTuple):
    """Where a tensor stands in a file."""

    dtype: str
    """Its name in the format, such as `BF16`."""
    shape: tuple[int, ...]
    begin: int
    """Within the data part, in bytes."""
    end: int


class Header(NamedTuple):
    """All of a file but its tensors' values."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    data_start: int
    """Where the data part begins in the file."""


def parse_header(path: Path) -> Header:
    """Read a file's header and check that the file is as long as it says.

    Raises:
        UserError: the file is missing, cut short or no safetensors file.
    """
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
        tensors = {
            name: StoredTensor(str(entry["dtype"]), tuple(entry["shape"]), *(int(place) for place in entry["data_offsets"]))
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _not_safetensors(path, start + text[:32]) from error
    end = 8 + length + max((tensor.end for tensor in tensors.values()), default=0)
    if end > size:
        raise _cut_short(path, size, end)
    return Header(tensors, metadata, 8 + length)


def _not_safetensors(path: Path, start: bytes) -> UserError:
    """Return what to raise for a file that is something else, judged by its first bytes."""
    if not start:
        return UserError(f"{path} is empty. Download or copy it again.")
    for signature, what in _FOREIGN_STARTS:
        if start.startswith(signature):
            return UserError(f"{path} is not a safetensors file but {what}.")
    return UserError(f"{path} is not a safetensors file, or it is damaged: its header cannot be read. Download or copy it again.")


def _cut_short(path: Path, size: int, expected: int | None) -> UserError:
    of = "" if expected is None else f" of {expected:,}"
    return UserError(f"{path} is cut short: it has {size:,}{of} bytes. Download or copy it again.")
