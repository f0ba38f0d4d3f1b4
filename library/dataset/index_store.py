"""What earlier starts found out about the files of a folder, kept in a small SQLite database.

The database is `.atelier_index.sqlite` inside the folder, or, where that cannot be written, a file in the user's cache folder. It
holds names without folders, so it goes with a folder that is moved. It is a cache: it may be deleted at any time, one that is
damaged is made again, and where none can be kept, files are read at every start.
"""

import hashlib
import logging
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any

import numpy as np

from library.dataset.columns import Ints
from library.files.remembered import user_cache_folder

logger = logging.getLogger(__name__)

STORE_NAME = ".atelier_index.sqlite"
_VERSION = 2
"""Of the tables and of what is in them: to be raised when files are read in another way than before."""
_WAIT_SECONDS = 30

_TABLES = {
    "images": """
        name TEXT PRIMARY KEY, bytes INTEGER, mtime_ns INTEGER,
        width INTEGER CHECK (typeof(width) = 'integer' AND width BETWEEN 1 AND 0xFFFFFF),
        height INTEGER CHECK (typeof(height) = 'integer' AND height BETWEEN 1 AND 0xFFFFFF),
        orientation INTEGER CHECK (orientation IN (1, 2, 3, 4, 5, 6, 7, 8)),
        traits INTEGER CHECK (typeof(traits) = 'integer' AND traits BETWEEN 0 AND 255)""",
    "captions": """
        name TEXT PRIMARY KEY, bytes INTEGER, mtime_ns INTEGER, text TEXT CHECK (typeof(text) = 'text')""",
    "notes": """
        name TEXT PRIMARY KEY, bytes INTEGER, mtime_ns INTEGER, text TEXT CHECK (typeof(text) = 'text')""",
}

ImageRow = tuple[str, int, int, int]
"""Name, size in bytes, time of the last change; and what the file's header says, in one number (see `packed_facts`)."""
CaptionRow = tuple[str, int, int, str]
"""Name, size in bytes, time of the last change; text."""
NoteRow = CaptionRow
"""The same of any file; what checks of the cache noted of it (see `file_notes`)."""

_SELECT = {
    "images": """
        SELECT name, bytes, mtime_ns, (width << 36) | (height << 12) | (orientation << 8) | traits FROM images ORDER BY name""",
    "captions": "SELECT name, bytes, mtime_ns, text FROM captions ORDER BY name",
    "notes": "SELECT name, bytes, mtime_ns, text FROM notes ORDER BY name",
}
_INSERT = {
    "images": "INSERT OR REPLACE INTO images VALUES (?1, ?2, ?3, ?4 >> 36, ?4 >> 12 & 0xFFFFFF, ?4 >> 8 & 15, ?4 & 255)",
    "captions": "INSERT OR REPLACE INTO captions VALUES (?, ?, ?, ?)",
    "notes": "INSERT OR REPLACE INTO notes VALUES (?, ?, ?, ?)",
}


def packed_facts(width: int, height: int, orientation: int, traits: int) -> int:
    """Put what is known of an image into one number: of a million rows each value less counts.

    Sides are below `images.SIDE_LIMIT`.
    """
    return width << 36 | height << 12 | orientation << 8 | traits


def unpacked_facts(
    packed: Sequence[int],
) -> tuple[Ints, "np.ndarray[Any, np.dtype[np.uint8]]", "np.ndarray[Any, np.dtype[np.uint8]]"]:
    """Return sizes (N, 2), orientations and traits of many images."""
    numbers = np.array(packed, dtype=np.int64)
    sizes = np.stack([numbers >> 36, numbers >> 12 & 0xFFFFFF], axis=1).astype(np.int32)
    return sizes, (numbers >> 8 & 15).astype(np.uint8), (numbers & 255).astype(np.uint8)


class IndexStore:
    """The database of one folder.

    Args:
        folder: the same path from wherever the folder is seen.
    """

    def __init__(self, folder: str) -> None:
        self._places = [os.path.join(folder, STORE_NAME)]
        cache = user_cache_folder("index")
        if cache is not None:
            digest = hashlib.sha256(folder.encode("utf-8", "surrogatepass")).hexdigest()[:32]
            self._places.append(os.path.join(cache, f"{digest}.sqlite"))

    def images(self) -> list[ImageRow]:
        """Return what is known of images, by name; of a name told twice, the later is newer."""
        return self._rows("images")

    def captions(self) -> list[CaptionRow]:
        """Return what is known of caption files, by name; of a name told twice, the later is newer."""
        return self._rows("captions")

    def notes(self) -> list[NoteRow]:
        """Return what was noted of files, by name; of a name told twice, the later is newer."""
        return self._rows("notes")

    def save(
        self,
        images: Iterable[ImageRow] = (),
        captions: Iterable[CaptionRow] = (),
        notes: Iterable[NoteRow] = (),
        gone: Iterable[str] = (),
    ) -> None:
        """Keep what was found out, and forget files that are gone; all of it or, if that fails, nothing."""
        new = {"images": _storable(images), "captions": _storable(captions), "notes": _storable(notes)}
        old = _storable((name,) for name in gone)
        failures = []
        for position, place in enumerate(self._places):
            failure = _saved(place, new, old)
            if failure is None:
                self._forget(old, self._places[position + 1 :])
                return
            failures.append(failure)
        logger.info("What was read in %s cannot be kept for the next start: %s.", os.path.dirname(self._places[0]), failures[0])

    def _forget(self, gone: list[Any], places: Sequence[str]) -> None:
        """Take files that are gone from places that are no longer written to but still read."""
        for place in filter(os.path.exists, places if gone else ()):
            if failure := _saved(place, {}, gone):
                logger.info("%s keeps rows of files that are gone: %s.", place, failure)

    def _rows(self, table: str) -> list[Any]:
        rows: list[Any] = []
        for place in sorted(filter(os.path.exists, self._places), key=os.path.getmtime):
            try:
                with closing(_open(place, "rw")) as database:
                    if database.execute("PRAGMA user_version").fetchone() == (_VERSION,):
                        rows += database.execute(_SELECT[table]).fetchall()
            except sqlite3.OperationalError as error:
                logger.info("%s cannot be read: %s.", place, error)
            except sqlite3.DatabaseError as error:
                _discard(place, error)
        return rows


def _open(place: str, mode: str) -> sqlite3.Connection:
    address = "file:" + place.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return sqlite3.connect(f"{address}?mode={mode}", uri=True, timeout=_WAIT_SECONDS, isolation_level=None)


def _saved(place: str, new: Mapping[str, list[Any]], gone: list[Any]) -> str | None:
    """Write to one database; return why that fails, or None."""
    for last_try in (False, True):
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with closing(_open(place, "rwc")) as database:
                _write(database, new, gone)
        except (sqlite3.OperationalError, sqlite3.IntegrityError) as error:  # the latter is of a new row, not of the database
            return str(error)
        except sqlite3.DatabaseError as error:
            _discard(place, error)
            if last_try:
                return str(error)
        except OSError as error:
            return error.strerror or str(error)
        else:
            return None
    return None


def _write(database: sqlite3.Connection, new: Mapping[str, list[Any]], gone: list[Any]) -> None:
    database.execute("PRAGMA synchronous=OFF")  # a power cut at worst damages what is made again, a kill does not
    database.execute("BEGIN IMMEDIATE")
    if database.execute("PRAGMA user_version").fetchone() != (_VERSION,):
        for table, columns in _TABLES.items():
            database.execute(f"DROP TABLE IF EXISTS {table}")
            database.execute(f"CREATE TABLE {table} ({columns}) WITHOUT ROWID")
        database.execute(f"PRAGMA user_version={_VERSION}")
    for table in _TABLES:
        database.executemany(_INSERT[table], new.get(table, ()))
        database.executemany(f"DELETE FROM {table} WHERE name = ?", gone)
    database.execute("COMMIT")


def _storable(rows: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Leave out rows with texts that are not Unicode, such as some file names: SQLite does not take them."""
    return [row for row in rows if _is_unicode(row[0]) and _is_unicode(row[-1])]


def _is_unicode(value: object) -> bool:
    if not isinstance(value, str) or value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _discard(place: str, error: sqlite3.DatabaseError) -> None:
    logger.warning("%s is damaged (%s) and is made again.", place, error)
    _remove(place)


def _remove(place: str) -> None:
    for path in (place, place + "-journal"):
        with suppress(OSError):
            os.remove(path)
