"""Whether the files of a state are whole, which is found out before a model is loaded for it."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import torch

from library.files.safetensors_header import parse_header
from library.options.errors import UserError

_NEEDED = ("model.safetensors", "optimizer.bin", "scheduler.bin")
"""Files that every state has, those of sd-scripts too."""


def sizes_of_files(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file of a state by its path inside the folder."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def check_present(folder: Path, names: Sequence[str]) -> None:
    """See that files of a state are there.

    Raises:
        UserError: one is not.
    """
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"--resume: {folder} is not a complete training state, it has no {', '.join(missing)}. Choose another state folder."
        )


def check_files(folder: Path, sizes: Mapping[str, int] | None) -> None:
    """See that a state's files are there and as long as they were written.

    Args:
        folder: of the state.
        sizes: as `sizes_of_files` gave them when it was saved; None where the state does not say, which is then judged by where
            its files end.

    Raises:
        UserError: a file is missing or damaged.
    """
    check_present(folder, _NEEDED if sizes is None else list(sizes))
    for name, size in (sizes or {}).items():
        if (found := (folder / name).stat().st_size) != size:
            refuse_damaged(folder / name, f"it has {found:,} bytes and was written with {size:,}")
    if sizes is None:
        _check_ends(folder)


def _check_ends(folder: Path) -> None:
    """See that no file is cut short: each kind says where it ends, or has its table of contents there."""
    for name in _NEEDED:
        path = folder / name
        if path.suffix == ".safetensors":
            try:
                parse_header(path)
            except UserError as error:
                refuse_damaged(path, str(error))
        elif not zipfile.is_zipfile(path):
            refuse_damaged(path, "it has no end, as files have that were not written or copied to it")


def load_part(path: Path) -> Any:
    """Read a state dict of a state.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError, ValueError, KeyError) as error:
        refuse_damaged(path, str(error) or type(error).__name__)


def refuse_damaged(path: Path, why: str) -> NoReturn:
    """Say that a file of a state cannot be used, and what to do.

    Args:
        path: of the file.
        why: how that shows.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"--resume: {path} is damaged: {why.splitlines()[0].rstrip('.')}. Copy the folder again from where it came from, or choose "
        "another state folder."
    )
