"""Read PyTorch pickle checkpoints (.ckpt, .pt, .pth, .bin) without ever running code from them, and write them atomically."""

import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from library.files.atomic import atomic_write
from library.options.errors import UserError

logger = logging.getLogger(__name__)

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.nn.parameter", "Parameter"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("builtins", "complex"),
}
"""Every name that a file may call; all of them only build tensors, numbers and plain containers."""


def load_pickle_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the dict that a checkpoint holds, with its tensors on the CPU, memory-mapped where the file's format allows it.

    Files that hold classes of training frameworks (Lightning callbacks and the like) are opened too: each such object becomes an
    inert `Stub`. No code of the file runs in any case.

    Raises:
        UserError: the file is missing, damaged, a TorchScript program, or holds something else than a dict.
    """
    _refuse_foreign(Path(path))
    try:
        content = _load(path, weights_only=True)
    except pickle.UnpicklingError:
        logger.info("%s holds objects besides weights; they are ignored.", path)
        content = _load_with_stubs(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} where a checkpoint holds a dict of tensors. Give another file.")
    return content


def state_dict_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a loaded checkpoint: those under `state_dict` where there is one, else those at its top."""
    inner = checkpoint.get("state_dict", checkpoint)
    return {str(name): value.detach() for name, value in inner.items() if isinstance(value, Tensor)}


def metadata_of(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """Return what a loaded checkpoint says beside its tensors: the texts under `metadata`, and `epoch` and `global_step`."""
    told = checkpoint.get("metadata")
    texts = {str(key): str(value) for key, value in told.items()} if isinstance(told, Mapping) else {}
    counts = {key: str(checkpoint[key]) for key in ("epoch", "global_step") if isinstance(checkpoint.get(key), int)}
    return texts | counts


def save_pickle_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a dict atomically; its tensors, at any depth of dicts and lists, are saved from the CPU and without their base.

    Raises:
        UserError: the disk is full or the folder not writable; the file that was there before stays whole.
    """
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(_for_saving(content), file)
        except RuntimeError as error:  # torch hides a full disk behind an error of its own
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


class Stub:
    """Stands for an object of a class that a file may not bring along; it takes everything and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Accept whatever the real class was made from."""

    def __setstate__(self, state: object) -> None:
        """Forget the state."""

    def __setitem__(self, key: object, value: object) -> None:
        """Forget the item."""

    def append(self, value: object) -> None:
        """Forget the value."""

    def extend(self, values: object) -> None:
        """Forget the values."""

    def __hash__(self) -> int:
        return id(self)


class _StubUnpickler(pickle.Unpickler):
    """Finds the allowed names only; any other becomes a `Stub` class of its own."""

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up; never imports anything outside the allowed list."""
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name.rpartition(".")[2], (Stub,), {})


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """Do what protocol 2 uses `_codecs.encode` for: bytes kept as latin-1 text."""
    return text.encode("latin1")


def _load(path: str | Path, **options: Any) -> Any:
    """Call `torch.load` with mapped memory for zip files; others cannot be mapped."""
    try:
        return torch.load(str(path), map_location="cpu", mmap=zipfile.is_zipfile(path), **options)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged bytes make torch fail in any way there is, IndexError and struct.error included
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is cut short or not a PyTorch checkpoint ({reason}). Download or copy it again.") from error


def _load_with_stubs(path: str | Path) -> Any:
    module = SimpleNamespace(
        __name__="pickle", Unpickler=_StubUnpickler, load=lambda file, **kwargs: _StubUnpickler(file, **kwargs).load()
    )
    try:
        return _load(path, weights_only=False, pickle_module=module)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is cut short or not a PyTorch checkpoint ({error}). Download or copy it again.") from error


def _refuse_foreign(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} is a folder, not a file." if path.is_dir() else f"{path} does not exist. Check the path.")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty. Download or copy it again.")
    with path.open("rb") as file:
        start = file.read(32)
    if start.startswith((b"version https://git-lfs", b"<")):
        raise UserError(f"{path} is a web page or a Git LFS pointer, not the file itself. Download it again.")
    if start[8:9] == b"{":
        raise UserError(f"{path} is a safetensors file. Rename it to end in .safetensors.")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UserError(f"{path} is a TorchScript program, which is never opened. Give a file of weights.")


def _for_saving(value: Any) -> Any:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.itemsize else tensor
    if isinstance(value, Mapping):
        return {key: _for_saving(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_for_saving(item) for item in value)
    return value
