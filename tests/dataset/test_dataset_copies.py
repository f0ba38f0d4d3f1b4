"""Copies among files, and the garbage collector that is kept from looking through many of them."""

import gc
from pathlib import Path

import pytest

from library.dataset.collector import without_collector
from library.dataset.duplicates import same_contents, same_files


@pytest.mark.parametrize("size", [500, 100_000])
def test_copies_are_told_from_files_that_differ_in_one_byte_wherever_it_is(tmp_path: Path, size: int) -> None:
    content = bytes(number % 251 for number in range(size))
    ends = {"first": 0, "middle": size // 2 + 10, "last": size - 1}
    for name, place in ends.items():
        (tmp_path / name).write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(content)
    names = ("one", *ends, "two")
    _, same_size = same_files(str(tmp_path / name) for name in names)
    assert [sorted(Path(path).name for path in group) for group in same_size] == [sorted(names)]
    assert same_contents(same_size) == [[str(tmp_path / "one"), str(tmp_path / "two")]]


def test_the_collector_works_again_as_it_did_before() -> None:
    @without_collector()
    def fail() -> None:
        raise KeyError(gc.isenabled())

    with pytest.raises(KeyError, match="False"):
        fail()
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
