"""Watch which files indexing reads."""

import os
from collections.abc import Callable
from typing import Any

import pytest

from library.dataset import folder_files


class OpenedFiles:
    """The names of the images and caption files that are read, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for reader in ("jpeg_facts", "inspect_image", "_read_caption"):
            monkeypatch.setattr(folder_files, reader, self._noting(getattr(folder_files, reader)))

    def during(self, work: Callable[[], Any]) -> set[str]:
        """Return what is read while something is done."""
        self.names.clear()
        work()
        return set(self.names)

    def _noting(self, read: Callable[[str], Any]) -> Callable[[str], Any]:
        def noting(path: str) -> Any:
            self.names.append(os.path.basename(path))
            return read(path)

        return noting
