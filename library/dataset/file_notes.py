"""What checks of the cache found out about files, remembered in the index of their folder.

A picture whose time alone differs from what its cache notes is hashed once, a cache of another program is read once; the next start
finds here what that told of the file as it still is.
"""

import os
from threading import Lock

from library.dataset.index_store import IndexStore, NoteRow


class FileNotes:
    """Tells what is known of files; may be asked by several threads."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, NoteRow]] = {}
        self._new: dict[str, dict[str, NoteRow]] = {}
        self._lock = Lock()

    def texts(self, path: str, status: os.stat_result) -> list[str]:
        """Return what was noted of a file of this size and time."""
        with self._lock:
            return self._texts(*os.path.split(path), status)

    def add(self, path: str, status: os.stat_result, text: str) -> None:
        """Note a text, without blanks, of a file as it was before it was read; notes of what it was earlier are dropped."""
        folder, name = os.path.split(path)
        with self._lock:
            texts = dict.fromkeys([*self._texts(folder, name, status), text])
            row = (name, status.st_size, status.st_mtime_ns, " ".join(texts))
            self._rows(folder)[name] = row
            self._new.setdefault(folder, {})[name] = row

    def save(self) -> None:
        """Keep what is new for the next start."""
        with self._lock:
            new, self._new = self._new, {}
        for folder, rows in new.items():
            IndexStore(folder).save(notes=rows.values())

    def _texts(self, folder: str, name: str, status: os.stat_result) -> list[str]:
        row = self._rows(folder).get(name)
        return row[3].split() if row is not None and row[1:3] == (status.st_size, status.st_mtime_ns) else []

    def _rows(self, folder: str) -> dict[str, NoteRow]:
        if folder not in self._known:
            self._known[folder] = {row[0]: row for row in IndexStore(folder).notes()}
        return self._known[folder]
