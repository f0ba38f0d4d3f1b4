"""The hashes by which user interfaces and training metadata name model files.

`sshs_model_hash` and `sshs_legacy_hash` identify network files whatever their training metadata; the model hashes are those of
the Stable Diffusion web UI.
"""

import hashlib
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path

from torch import Tensor

from library.files.safetensors_layout import data_chunks, header_bytes, stored_info

_WINDOW_START = 0x100000
_WINDOW_SIZE = 0x10000
_SAMPLES = 64
_WEIGHTS = frozenset({".safetensors", ".bin", ".ckpt", ".pt"})


def model_hash(path: str | Path) -> str:
    """Return the old short hash of a model file: the first 8 hex digits of the SHA-256 of 64 KiB at 1 MiB.

    `NOFILE` where nothing is there, `IsADirectory` for a folder.
    """
    if not Path(path).exists():
        return "NOFILE"
    if Path(path).is_dir():
        return "IsADirectory"
    with Path(path).open("rb") as file:
        file.seek(_WINDOW_START)
        return hashlib.sha256(file.read(_WINDOW_SIZE)).hexdigest()[:8]


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a whole file as 64 hex digits; `NOFILE` and `IsADirectory` as `model_hash` gives them."""
    if not Path(path).exists():
        return "NOFILE"
    if Path(path).is_dir():
        return "IsADirectory"
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_files(path: Path) -> list[Path]:
    """Return the files with the weights of a model that is a file, or a folder with any of them below it."""
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix in _WEIGHTS)


def sampled_hash(path: str | Path) -> str:
    """Return 16 hex digits for the size of a model file and samples of its content, or of all weights in a folder.

    Reads a few megabytes however large the file is: it tells models apart, and says nothing about damage.
    """
    digest = hashlib.blake2b(digest_size=8)
    root = Path(path)
    for file in weight_files(root):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root)}:{size};".encode())
        with file.open("rb") as opened:
            for number in range(_SAMPLES):
                opened.seek(size * number // _SAMPLES)
                digest.update(opened.read(_WINDOW_SIZE))
    return digest.hexdigest()


def sshs_model_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors' bytes as safetensors stores them; metadata has no influence."""
    digest = hashlib.sha256()
    for chunk in data_chunks(tensors):
        digest.update(chunk)
    return digest.hexdigest()


def sshs_legacy_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return 8 hex digits of the 64 KiB at 1 MiB of the file that the tensors and the `ss_` entries alone would make.

    A file below 1 MiB gives `e3b0c442`, the hash of nothing.
    """
    header = header_bytes(
        {name: stored_info(tensor, None) for name, tensor in tensors.items()},
        {key: value for key, value in metadata.items() if key.startswith("ss_")},
    )
    window = _window(_chain(header, tensors), _WINDOW_START, _WINDOW_SIZE)
    return hashlib.sha256(window).hexdigest()[:8]


def add_network_hashes(metadata: MutableMapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Set `sshs_model_hash` and `sshs_legacy_hash` for tensors that are already in the dtype they are saved in."""
    metadata["sshs_model_hash"] = sshs_model_hash(tensors)
    metadata["sshs_legacy_hash"] = sshs_legacy_hash(tensors, metadata)


def _chain(header: bytes, tensors: Mapping[str, Tensor]) -> Iterable[memoryview]:
    yield memoryview(header)
    yield from data_chunks(tensors)


def _window(chunks: Iterable[memoryview], start: int, size: int) -> bytes:
    """Return up to `size` bytes from position `start` of a stream, reading no further than needed."""
    found = bytearray()
    position = 0
    for chunk in chunks:
        if position >= start + size:
            break
        found += chunk[max(0, start - position) : max(0, start + size - position)]
        position += len(chunk)
    return bytes(found)
