"""Keep processes from changing the same files at the same time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if os.name == "posix":
    import fcntl


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Hold the only lock on a folder: for reading a file there, adding to it, and writing it back.

    The lock leaves no file behind and ends with the process, however that ends. Where there are no such locks (Windows, some
    network drives) nothing is held.
    """
    if os.name != "posix":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # the file system knows no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
