"""Folders of images that are nowhere, for tests of what is done with many images."""

from collections.abc import Callable, Mapping, Sequence

from library.dataset.folder_files import FolderFiles, Notes
from library.dataset.index_store import packed_facts


def made_up(folders: Mapping[str, Sequence[tuple[int, int]]]) -> Callable[[str], FolderFiles]:
    """Return what opens folders as if they held images of these sizes."""

    class MadeUpFolder(FolderFiles):
        def __init__(self, folder: str) -> None:
            self.prefix, self.real = f"{folder}/", f"/real/{folder}"
            self.stems = [f"{number:03}" for number in range(len(folders[folder]))]
            self.images = [f"{stem}.jpg" for stem in self.stems]
            self.names = frozenset([*self.images, *(f"{stem}.txt" for stem in self.stems)])
            self._sizes = dict(zip(self.images, folders[folder], strict=True))

        def image_facts(self, names: Sequence[str], problems: dict[str, str], noted: Notes[int] | None = None) -> list[int | None]:
            return [packed_facts(*self._sizes[name], 1, 0) for name in names]

        def caption_texts(
            self, names: Sequence[str], problems: dict[str, str], noted: Notes[str] | None = None
        ) -> list[str | None]:
            return [f"caption of {name}" for name in names]

    return MadeUpFolder
