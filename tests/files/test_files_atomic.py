import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.files.atomic import atomic_folder, atomic_write, atomic_write_bytes, atomic_write_text, make_folder
from library.options.errors import UserError


def test_the_new_content_takes_the_place_of_the_old(tmp_path):
    target = tmp_path / "new" / "folder" / "a.txt"
    atomic_write_text(target, "one")
    atomic_write_text(target, "zwei ä\n")
    assert target.read_bytes() == "zwei ä\n".encode()
    assert os.listdir(target.parent) == ["a.txt"]


def interrupt_after(_):
    raise KeyboardInterrupt


def test_an_error_while_writing_leaves_the_old_file_whole_and_no_temporary_file(tmp_path):
    target = tmp_path / "a.bin"
    atomic_write_bytes(target, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as temporary:
        interrupt_after(temporary.write_bytes(b"half of the new con"))
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_target_does_not_change_before_the_block_ends(tmp_path):
    target = tmp_path / "a.bin"
    atomic_write_bytes(target, b"old")
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == target.parent
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


def test_whoever_has_the_old_file_open_goes_on_reading_the_old_content(tmp_path):
    target = tmp_path / "a.bin"
    atomic_write_bytes(target, b"old")
    with target.open("rb") as reader:
        atomic_write_bytes(target, b"new")
        assert reader.read() == b"old"


def test_a_symbolic_link_stays_a_link_and_its_file_is_replaced(tmp_path):
    real = tmp_path / "disk" / "real.bin"
    atomic_write_bytes(real, b"old")
    link = tmp_path / "link.bin"
    link.symlink_to(Path("disk") / "real.bin")
    atomic_write_bytes(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"


def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path):
    target = tmp_path / "a.bin"
    atomic_write_bytes(target, b"old")
    with pytest.raises(UserError, match=r"a\.bin could not be written: the disk is full"), atomic_write(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_bytes() == b"old"


def test_an_operating_system_error_about_something_else_is_not_disguised(tmp_path):
    with pytest.raises(OSError, match="Input/output error"), atomic_write(tmp_path / "a.bin"):
        raise OSError(errno.EIO, "Input/output error")


SAVE_TOO_MUCH = """
import resource, signal, sys, torch
from library.files.{module} import {function}
from library.options.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    {function}(sys.argv[1], {{"w": torch.ones(100_000)}})
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("module", "function"),
    [("safetensors_io", "save_safetensors"), ("pickle_io", "save_pickle_checkpoint")],
    ids=["safetensors", "pickle"],
)
def test_a_file_that_the_system_stops_half_way_leaves_the_old_one_whole(tmp_path, module, function):
    target = tmp_path / "w.bin"
    target.write_bytes(b"old")
    code = SAVE_TOO_MUCH.format(module=module, function=function)
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=True)
    assert f"{target} could not be written" in done.stdout
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["w.bin"]


@pytest.mark.parametrize("below", ["a.json", "new/a.json"])
def test_a_place_below_a_file_is_told_in_a_sentence(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/.*a\.json could not be written: a .*file"):
        atomic_write_text(tmp_path / "file" / below, "x")
    with pytest.raises(UserError, match=r"file/.*a\.json could not be written: a .*file"), atomic_folder(tmp_path / "file" / below):
        pass


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system in which nobody can make files")
def test_a_place_where_the_system_lets_nobody_make_files_is_told_in_a_sentence():
    for path in ("/proc/nope/a.json", "/proc/a.json"):
        with pytest.raises(UserError, match=r"a\.json could not be written: that folder"):
            atomic_write_text(path, "x")
    for path in ("/proc", "/proc/nope"):
        with pytest.raises(UserError, match="/proc"):
            make_folder(path)


def test_another_file_that_is_missing_is_not_taken_for_the_target(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a.bin"):
        (tmp_path / "source.bin").read_bytes()
