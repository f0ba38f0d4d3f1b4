"""The safetensors byte layout: an 8-byte header length, a JSON header, then the tensors' bytes.

The writer is our own because the safetensors library keeps a CPU copy of every tensor alive until the file is complete; this one
holds a single tensor at a time, so a 7 GB checkpoint is saved from a GPU, and in another dtype, with a few MB of memory. The
order of the tensors (largest dtype first, then by name) and the header are those of the library, because hashes depend on them.
"""

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# In the order in which the library ranks dtypes: files hold them from the last to the first.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


class TensorInfo(NamedTuple):
    """What a file header tells of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def stored_info(tensor: Tensor, dtype: torch.dtype | None) -> TensorInfo:
    """Tell how a tensor will stand in a file whose floating-point tensors are saved as `dtype` (None: as they are)."""
    kept = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
    return TensorInfo(kept, tuple(tensor.shape))


def file_order(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Return the tensor names in the order of their bytes in the file."""
    return sorted(infos, key=lambda name: (-_RANKS[infos[name].dtype], name))


def header_bytes(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    """Build everything that precedes the tensors' bytes; the JSON is padded with spaces to a multiple of 8."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in file_order(infos):
        dtype, shape = infos[name]
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def data_chunks(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Iterator[memoryview]:
    """Yield the bytes of each tensor in file order, one tensor at a time."""
    infos = {name: stored_info(tensor, dtype) for name, tensor in tensors.items()}
    for name in file_order(infos):
        tensor = tensors[name].detach().to("cpu", infos[name].dtype).contiguous()
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
