"""Hashes of large files that are remembered from one start to the next, as long as the files have the same size and time.

They lie in the user's cache folder, a small file for each; they may be deleted at any time.
"""

import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from library.files.atomic import atomic_write, make_folder
from library.options.errors import UserError

log = logging.getLogger(__name__)

_WORTH = 2**26
"""Bytes below which hashing takes no time worth remembering."""
_STILL_CHANGING = 2.0
"""Seconds after a change in which another one might leave the time as it is."""
_HASH = re.compile(r"[0-9a-f]{8,64}")


def user_cache_folder(name: str) -> Path | None:
    """Return where this user's programs keep what they can make again; None where the system names no such place.

    Args:
        name: of the folder inside ours.
    """
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
    elif sys.platform == "darwin":
        base = os.path.join(home, "Library", "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    return Path(base, "atelier", name) if os.path.isabs(base) else None


def remembered_hash(what: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """Return the hash that `compute` gives, or that it gave when the files had the names, sizes and times that they have now.

    Args:
        what: the hash is of, where there are several of the same files.
        files: that it depends on.
        compute: reads the files; gives hexadecimal digits.
    """
    place = _place(what, files)
    if place is None:
        return compute()
    try:
        known = place.read_text(encoding="ascii")
        if _HASH.fullmatch(known):
            return known
    except (OSError, UnicodeDecodeError):
        log.debug("%s is not known yet.", what)
    value = compute()
    try:
        make_folder(place.parent)
        with atomic_write(place) as unfinished:
            unfinished.write_text(value, encoding="ascii")
    except (OSError, UserError) as error:
        log.debug("%s is not remembered: %s", what, error)
    return value


def _place(what: str, files: Sequence[Path]) -> Path | None:
    """Return the file that has, or may be given, the hash; None where it is not worth it or the files have only just changed."""
    folder = user_cache_folder("hashes")
    digest, size = hashlib.sha256(what.encode()), 0
    for file in files:
        status = file.stat()
        size += status.st_size
        digest.update(f"\n{file.resolve()}\n{status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogatepass"))
        if time.time() - status.st_mtime < _STILL_CHANGING:
            return None
    return None if folder is None or size < _WORTH else folder / digest.hexdigest()[:32]
