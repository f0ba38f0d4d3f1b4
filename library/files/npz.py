"""Read and atomically write numpy archives, the files that caches live in."""

import io
import threading
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from library.files.atomic import atomic_write
from library.options.errors import UserError

Arrays = dict[str, np.ndarray[Any, Any]]

DAMAGE = (ValueError, EOFError, KeyError, AttributeError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error, OSError)
"""What reading a damaged archive, or one of a kind that no cache is, may raise."""

_parsing = threading.Lock()
"""Held while numpy evaluates an array's header as Python: until 3.12, CPython raises SystemError when threads do that at once."""


def parse_array(data: bytes) -> np.ndarray[Any, Any]:
    """Return the array of an npy file's bytes; any number of threads may call this.

    Raises:
        ValueError: the bytes are no npy file, are cut short, or hold pickled objects.
    """
    with _parsing:
        array: np.ndarray[Any, Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return array


def read_npz(path: str | Path, keys: Collection[str] | None = None) -> Arrays:
    """Return the arrays of an archive; with `keys`, only those of them that it holds, the others are not read from the disk.

    Raises:
        UserError: the file is missing, damaged, no npz archive, or holds pickled objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            return {name: parse_array(archive.read(f"{name}.npy")) for name in names if keys is None or name in keys}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist. Check the path.") from error
    except DAMAGE as error:
        raise UserError(f"{path} is damaged or not an npz archive ({error}). Delete it, and it will be made again.") from error


def write_npz(path: str | Path, arrays: Mapping[str, np.ndarray[Any, Any]], compressed: Collection[str] = ()) -> None:
    """Write arrays in place of whatever is at `path`.

    Args:
        path: the file.
        arrays: by name; they are stored as they are, as `numpy.savez` does.
        compressed: names of those that are worth the time, as `numpy.savez_compressed` does; `numpy.load` reads both.

    Raises:
        UserError: the disk is full or the folder not writable.
    """
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
