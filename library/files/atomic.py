"""Write files so that a kill, a full disk or Ctrl+C at any moment leaves the previous file whole.

The new content goes to a hidden temporary name in the same folder, is flushed to the disk, and takes the place of the old file in
one rename.
"""

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from library.options.errors import UserError

_WRITE_REFUSALS = {
    errno.ENOSPC: "the disk is full. Free some space there or write to another folder",
    errno.EDQUOT: "the disk quota is used up. Free some space there or write to another folder",
    errno.EFBIG: "the file system does not allow a file this large. Write to another disk",
    errno.EACCES: "permission is denied. Change the rights of the folder or write to another one",
    errno.EPERM: "permission is denied. Change the rights of the folder or write to another one",
    errno.EROFS: "the file system is read-only. Write to another folder",
    errno.ENAMETOOLONG: "the file name is too long. Choose a shorter name",
    errno.ENOTDIR: "a part of that path is a file, not a folder. Choose another folder",
    errno.EISDIR: "there is a folder of that name. Choose another name",
    errno.EEXIST: "a file of that name is in the way. Move it away or choose another name",
    errno.ENOENT: "that folder cannot be made. Choose another one",
}


@contextmanager
def atomic_write(path: str | Path, *, keeps_ending: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends without an error, it becomes `path`.

    Missing folders are made. A symbolic link stays a link: the file it points to is replaced.

    Args:
        path: of the file.
        keeps_ending: whether the temporary path ends as `path` does, for writers that choose the format by it.

    Raises:
        UserError: the disk is full, the folder is not writable or the like; whatever stood at `path` before is untouched.
    """
    target = Path(path).resolve()
    ending = target.suffix if keeps_ending else ""
    temporary = target.with_name(f".{target.name[:200]}.{os.getpid()}-{secrets.token_hex(4)}.tmp{ending}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, target)
        _flush_folder(target.parent)
    except OSError as error:
        raise _refusal(path, temporary, error) from error
    finally:
        with suppress(OSError):  # below a file, or on a disk that is gone; what went wrong is told already
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; when the block ends without an error, it takes the place of `path`.

    A kill in the moment between the two renames leaves the old and the new folder whole, under hidden names beside `path`.

    Raises:
        UserError: the disk is full, the folder is not writable or the like; whatever stood at `path` before is untouched.
    """
    target = Path(path).absolute()
    temporary = target.with_name(f".{target.name}.unfinished")
    retired = target.with_name(f".{target.name}.retired")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        shutil.rmtree(retired, ignore_errors=True)
        if target.exists():
            target.rename(retired)
        temporary.rename(target)
        _flush_folder(target.parent)
        shutil.rmtree(retired, ignore_errors=True)
    except OSError as error:
        raise _refusal(path, temporary, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: str | Path) -> None:
    """Make a folder, with those above it, and make sure that something can be made in it.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=".probe-", dir=path))  # asking for rights does not tell of disks that take no files
    except OSError as error:
        raise _refusal(path, Path(error.filename or path), error) from error


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Replace the content of `path` as `atomic_write` does."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def atomic_write_text(path: str | Path, content: str) -> None:
    """Replace the content of `path` by UTF-8 text, as `atomic_write` does; line ends stay as they are given."""
    atomic_write_bytes(path, content.encode("utf-8"))


def _refusal(path: str | Path, temporary: Path, error: OSError) -> Exception:
    """Return the error as a sentence, or the error itself where it is none that a person can do something about."""
    reason = _WRITE_REFUSALS.get(error.errno or 0)
    is_ours = error.filename in {str(temporary), *map(str, temporary.parents)}
    if reason is None or (error.errno in (errno.EEXIST, errno.ENOENT) and not is_ours):  # of other files, those tell of a defect
        return error
    return UserError(f"{path} could not be written: {reason}. Nothing that was there before has changed.")


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the rename itself last; systems on which a folder cannot be opened (Windows) do this on their own."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
