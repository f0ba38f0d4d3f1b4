"""What is remembered from one start to the next."""

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from dataset_samples import config, make_image, section, subset
from hypothesis import given
from hypothesis import strategies as st
from opened_files import OpenedFiles
from PIL import Image

from library.dataset import index_store
from library.dataset.file_notes import FileNotes
from library.dataset.images import SIDE_LIMIT
from library.dataset.index import Section, build_index
from library.dataset.index_store import STORE_NAME, IndexStore, packed_facts, unpacked_facts
from library.options.errors import UserError


class Opened(OpenedFiles):
    def in_start(self, folder: Path, **changes: object) -> set[str]:
        return self.during(lambda: index(folder, **changes))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    return Opened(monkeypatch)


@pytest.fixture(autouse=True)
def cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def index(folder: Path, **changes: object) -> Section:
    (found,) = build_index(config(section(subset(folder, **changes))))
    return found


def touch(path: Path, seconds: int = 10) -> None:
    """Make a file look as if it was changed."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + seconds * 10**9))


def test_a_second_start_opens_nothing_and_finds_the_same(folder: Path, opened: Opened) -> None:
    make_image(folder / "im5.jpg", (50, 40))
    make_image(folder / "turned.png", (50, 40))
    first = list(index(folder).items)
    assert len(opened.names) >= 12
    assert opened.in_start(folder) == set()
    assert list(index(folder).items) == first


def test_exactly_what_changed_is_read_again(folder: Path, opened: Opened) -> None:
    index(folder)
    (folder / "im1.txt").write_text("another caption\n")
    make_image(folder / "im2.png", (32, 48))
    make_image(folder / "new.png")
    touch(folder / "im3.png")
    assert opened.in_start(folder, class_tokens="") == {"im1.txt", "im2.png", "new.png", "im3.png"}
    found = {Path(item.path).name: item for item in index(folder, class_tokens="").items}
    assert found["im1.png"].caption == "another caption"
    assert found["im2.png"].size == (32, 48)
    assert opened.in_start(folder, class_tokens="") == set()


def test_a_file_of_another_length_is_read_again_whatever_its_time_says(folder: Path, opened: Opened) -> None:
    index(folder)
    for name in ("im0.txt", "im1.png"):
        before = (folder / name).stat()
        if name.endswith("txt"):
            (folder / name).write_text("longer than it was, and of the same time\n")
        else:
            make_image(folder / name, (128, 96))
        os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert opened.in_start(folder) == {"im0.txt", "im1.png"}


def test_a_picture_too_long_for_the_database_is_told_and_the_database_stays(folder: Path, opened: Opened, caplog) -> None:
    index(folder)
    Image.new("1", (SIDE_LIMIT, 1)).save(folder / "long.png")
    for _ in range(2):
        with pytest.raises(UserError, match=r"long\.png is 16777216x1; sides of 16,777,216 pixels and more are not taken"):
            index(folder, class_tokens="")
    (folder / "long.png").unlink()
    assert opened.in_start(folder) == set()
    assert "damaged" not in caplog.text


def test_a_row_that_a_database_refuses_does_not_damage_it(folder: Path, caplog) -> None:
    index(folder)
    store = IndexStore(str(folder))
    known = store.images()
    with caplog.at_level(logging.INFO):
        store.save(images=[("new.png", 1, 1, packed_facts(0, 5, 1, 0))])
    assert "cannot be kept for the next start: CHECK constraint failed" in caplog.text
    assert "damaged" not in caplog.text
    assert store.images() == known != []


def test_files_that_are_gone_are_forgotten(folder: Path) -> None:
    index(folder)
    (folder / "im0.png").unlink()
    (folder / "im1.txt").unlink()
    assert len(index(folder, class_tokens="").items) == 4
    store = IndexStore(str(folder))
    assert {row[0] for row in store.images()} == {"im1.png", "im2.png", "im3.png", "im4.png"}
    assert {row[0] for row in store.captions()} == {"im0.txt", "im2.txt", "im3.txt", "im4.txt"}


def test_notes_of_caches_that_are_gone_are_forgotten_and_others_stay(folder: Path) -> None:
    cache = folder / "im5_sdxl.npz"
    cache.write_bytes(b"cache")
    notes = FileNotes()
    notes.add(str(cache), cache.stat(), "good")
    notes.save()
    index(folder)
    assert FileNotes().texts(str(cache), cache.stat()) == ["good"]
    cache.unlink()
    index(folder)
    assert IndexStore(str(folder)).notes() == []


def test_captions_of_another_ending_are_kept_beside_each_other(folder: Path, opened: Opened) -> None:
    (folder / "im0.caption").write_text("other\n")
    index(folder)
    assert opened.in_start(folder, caption_extension=".caption") == {"im0.caption"}
    assert opened.in_start(folder) == set()


def test_a_remembered_caption_follows_the_rules_of_now(folder: Path) -> None:
    (folder / "im0.txt").write_text("first\n\nsecond\n")
    assert index(folder).items[0].caption == "first"
    assert index(folder, enable_wildcard=True).items[0].caption == "first\nsecond"


def test_what_is_remembered_goes_with_a_folder_that_is_moved(folder: Path, opened: Opened, tmp_path: Path) -> None:
    index(folder)
    moved = tmp_path / "elsewhere" / "with 'quotes' %20 ? #"
    moved.parent.mkdir()
    folder.rename(moved)
    assert opened.in_start(moved) == set()


def test_damaged_images_are_told_at_every_start(folder: Path) -> None:
    index(folder)
    (folder / "im0.png").write_bytes((folder / "im0.png").read_bytes()[:-40])
    (folder / "im1.txt").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            index(folder)
        assert "im0.png cannot be read" in str(caught.value)
        assert "im1.txt is an empty caption file" in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    {
        "no database": lambda content: b"this is no database, whatever its name says" * 100,
        "tables spoiled": lambda content: content[:5000] + b"\xa5" * (len(content) - 5000),
        "cut off": lambda content: content[:8192],
        "pages that never reached the disk": lambda content: content[:4096] + bytes(len(content) - 4096),
    }.items(),
    ids=lambda damage: damage[0],
)
def test_a_damaged_database_is_made_again_and_one_line_says_so(folder: Path, opened: Opened, caplog, damage) -> None:
    index(folder)
    place = folder / STORE_NAME
    place.write_bytes(damage[1](place.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert len(opened.in_start(folder)) == 10
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [f"{place} is damaged"]
    assert opened.in_start(folder) == set()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE images SET width = 0",
        "UPDATE images SET height = 1.5",
        "UPDATE images SET orientation = 'up'",
        "UPDATE images SET traits = NULL",
        "UPDATE captions SET text = NULL",
        "UPDATE captions SET text = x'ff'",
    ],
)
def test_rows_that_cannot_be_are_refused_by_the_database(folder: Path, change: str) -> None:
    index(folder)
    database = sqlite3.connect(folder / STORE_NAME)
    with pytest.raises(sqlite3.IntegrityError):
        database.execute(change)
    database.close()


def test_a_database_of_another_version_is_made_again(folder: Path, opened: Opened, monkeypatch) -> None:
    index(folder)
    monkeypatch.setattr(index_store, "_VERSION", index_store._VERSION + 1)
    assert len(opened.in_start(folder)) == 10
    assert opened.in_start(folder) == set()


def test_a_folder_that_cannot_be_written_is_remembered_in_the_cache_folder(folder: Path, opened: Opened, cache_home: Path) -> None:
    (folder / STORE_NAME).mkdir()  # in its place nothing can be written, whoever tries
    index(folder)
    (kept,) = (cache_home / "atelier" / "index").iterdir()
    assert kept.suffix == ".sqlite"
    assert opened.in_start(folder) == set()
    touch(folder / "im0.png")
    assert opened.in_start(folder) == {"im0.png"}
    assert opened.in_start(folder) == set()


def test_once_the_folder_can_be_written_what_is_newer_counts(folder: Path, opened: Opened) -> None:
    (folder / STORE_NAME).mkdir()
    index(folder)
    (folder / STORE_NAME).rmdir()
    touch(folder / "im0.png")
    assert opened.in_start(folder) == {"im0.png"}
    assert (folder / STORE_NAME).is_file()
    assert opened.in_start(folder) == set()


def test_files_that_are_gone_are_forgotten_in_the_cache_folder_too(folder: Path, cache_home: Path) -> None:
    (folder / STORE_NAME).mkdir()
    index(folder)
    (folder / STORE_NAME).rmdir()
    index(folder)  # reads from the cache folder
    (folder / "im0.png").unlink()
    (folder / "im0.txt").unlink()
    index(folder)
    (kept,) = (cache_home / "atelier" / "index").iterdir()
    before = kept.stat().st_mtime_ns, sorted(os.listdir(folder))
    store = IndexStore(str(folder))
    assert "im0.png" not in {row[0] for row in store.images()}
    assert "im0.txt" not in {row[0] for row in store.captions()}
    index(folder)
    assert (kept.stat().st_mtime_ns, sorted(os.listdir(folder))) == before


def test_where_nothing_can_be_kept_files_are_read_at_every_start(folder: Path, opened: Opened, cache_home: Path, caplog) -> None:
    (folder / STORE_NAME).mkdir()
    cache_home.write_text("a file where the folder would be")
    with caplog.at_level(logging.INFO):
        index(folder)
    assert "cannot be kept for the next start" in caplog.text
    assert len(opened.in_start(folder)) == 10


def test_a_folder_that_is_named_like_a_picture_or_a_caption_is_none(folder: Path, caplog) -> None:
    (folder / "folder.png").mkdir()
    (folder / "im0.txt").unlink()
    (folder / "im0.txt").mkdir()
    assert [item.caption for item in index(folder, class_tokens="dog").items][:2] == ["dog", "picture 1, tag a, tag b"]
    assert len(index(folder, class_tokens="dog").items) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_names_that_are_not_unicode_are_read_and_not_remembered(folder: Path, opened: Opened) -> None:
    odd = os.fsencode(folder) + b"/caf\xe9.png"
    shutil.copy(folder / "im0.png", odd)
    paths = [item.path for item in index(folder, class_tokens="").items]
    assert os.fsencode(paths[0]) == odd
    assert len(opened.in_start(folder, class_tokens="")) == 1


@given(st.lists(st.tuples(st.integers(1, 0xFFFFFF), st.integers(1, 0xFFFFFF), st.integers(1, 8), st.integers(0, 255)), max_size=20))
def test_packed_facts_come_out_as_they_went_in(rows: list[tuple[int, int, int, int]]) -> None:
    sizes, orientations, traits = unpacked_facts([packed_facts(*row) for row in rows])
    again = zip(sizes.tolist(), orientations.tolist(), traits.tolist(), strict=True)
    assert [(*size, orientation, trait) for size, orientation, trait in again] == rows


def test_facts_are_kept_as_columns_that_can_be_read(folder: Path) -> None:
    index(folder)
    with sqlite3.connect(folder / STORE_NAME) as database:
        rows = database.execute("SELECT name, width, height, orientation, traits FROM images ORDER BY name").fetchall()
    database.close()
    assert rows[1:3] == [("im1.png", 96, 64, 1, 0), ("im2.png", 64, 96, 1, 0)]


_INDEXING = """
import os, signal, sys, time
sys.path[:0] = {path!r}
from dataset_samples import config, section, subset
from library.dataset import folder_files
from library.dataset.index import build_index
folder_files._SAVED_EVERY = 0

def start():
    process = os.fork()
    if process == 0:
        build_index(config(section(subset({folder!r}))))
        os._exit(0)
    return process

processes = [start() for _ in range({at_once})]
codes = [os.waitpid(process, 0)[1] for process in processes]
for delay in {delays!r}:
    process = start()
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    codes.append(os.waitpid(process, 0)[1])
print(codes)
"""
_LARGE = 400


def in_processes(folder: Path, at_once: int = 0, delays: Sequence[float] = ()) -> str:
    """Index a folder in several processes at once, then in others that are killed; return how each ended."""
    path = [str(Path.cwd()), str(Path(__file__).parent)]
    program = _INDEXING.format(path=path, folder=str(folder), at_once=at_once, delays=list(delays))
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder whose indexing takes a moment."""
    folder = tmp_path / "large"
    folder.mkdir()
    make_image(folder / "a.jpg")
    for number in range(_LARGE):
        (folder / f"{number:04}.jpg").write_bytes((folder / "a.jpg").read_bytes())
        (folder / f"{number:04}.txt").write_text(f"caption {number}\n")
    (folder / "a.jpg").unlink()
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_two_processes_may_index_one_folder(large: Path, opened: Opened) -> None:
    assert in_processes(large, at_once=2) == "[0, 0]"
    assert opened.in_start(large) == set()


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_kill_at_any_moment_leaves_a_database_that_can_be_used(large: Path, opened: Opened, caplog) -> None:
    assert "9" in in_processes(large, delays=(0.0, 0.01, 0.02, 0.03, 0.05, 0.1))
    found = index(large)
    assert [item.caption for item in found.items] == [f"caption {number}" for number in range(_LARGE)]
    assert "damaged" not in caplog.text
    assert opened.in_start(large) == set()
