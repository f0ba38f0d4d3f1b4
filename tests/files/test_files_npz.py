import gc
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from library.files.npz import read_npz, write_npz
from library.options.errors import UserError


def test_arrays_are_read_back_and_numpy_reads_them_too(tmp_path):
    arrays = {
        "latents": np.arange(6, dtype=np.float32).reshape(2, 3),
        "original_size": np.array([640, 480]),
        "caption": np.array("text"),
    }
    write_npz(tmp_path / "a.npz", arrays)
    assert os.listdir(tmp_path) == ["a.npz"]
    found = read_npz(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as theirs:
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            np.testing.assert_array_equal(theirs[name], array)


def test_only_the_wanted_arrays_are_read(tmp_path):
    write_npz(tmp_path / "a.npz", {"a": np.zeros(2), "b": np.ones(3)})
    assert list(read_npz(tmp_path / "a.npz", ["b", "c"])) == ["b"]


def test_damaged_missing_and_pickled_archives_are_one_sentence(tmp_path):
    write_npz(tmp_path / "cut.npz", {"a": np.zeros(1000)})
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:500])
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], dtype=object))
    np.save(tmp_path / "bare.npz", np.zeros(2))
    (tmp_path / "bare.npz.npy").rename(tmp_path / "bare.npz")
    for name in ("cut", "text", "empty", "pickled", "bare"):
        with pytest.raises(UserError, match=rf"{name}\.npz is damaged or not an npz archive"):
            read_npz(tmp_path / f"{name}.npz")
    with pytest.raises(UserError, match="does not exist"):
        read_npz(tmp_path / "no.npz")


def test_threads_may_read_at_once_while_garbage_is_collected(tmp_path):
    write_npz(tmp_path / "a.npz", {"a": np.arange(4)})
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()

    def callback(phase, info):
        sum(range(20))  # Python code within a collection: here threads change places, also in the midst of parsing

    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(5, 2, 2)
        gc.callbacks.append(callback)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: read_npz(tmp_path / "a.npz")["a"], range(2000)))
    finally:
        gc.callbacks.remove(callback)
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(interval)
    assert all(np.array_equal(array, np.arange(4)) for array in found)
