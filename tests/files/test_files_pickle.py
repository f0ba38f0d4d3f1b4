import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from library.files.pickle_io import Stub, load_pickle_checkpoint, save_pickle_checkpoint, state_dict_of
from library.options.errors import UserError


class ModelCheckpoint:
    """Stands for a callback of a training framework."""

    def __init__(self):
        self.best = [1, 2]


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_plain_checkpoint_is_read(tmp_path, zipped):
    weights = OrderedDict(w=torch.randn(3, 4).half(), b=torch.nn.Parameter(torch.randn(2)))
    torch.save({"state_dict": weights, "epoch": 7}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    content = load_pickle_checkpoint(tmp_path / "a.ckpt")
    assert content["epoch"] == 7
    found = state_dict_of(content)
    assert torch.equal(found["w"], weights["w"])
    assert torch.equal(found["b"], weights["b"].detach())
    assert not found["b"].requires_grad


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_objects_of_training_frameworks_become_stubs_and_the_weights_are_read(tmp_path, zipped):
    content = {"state_dict": {"w": torch.arange(4.0)}, "callbacks": {ModelCheckpoint: ModelCheckpoint()}, "step": np.float64(3.5)}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    found = load_pickle_checkpoint(tmp_path / "a.ckpt")
    assert state_dict_of(found)["w"].tolist() == [0, 1, 2, 3]
    assert all(isinstance(value, Stub) for value in found["callbacks"].values())
    assert found["step"] == 3.5


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_never_runs_code(tmp_path, zipped):
    trap = tmp_path / "owned"
    torch.save(
        {"state_dict": {"w": torch.ones(1)}, "x": Payload(str(trap))}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped
    )
    found = load_pickle_checkpoint(tmp_path / "a.ckpt")
    assert isinstance(found["x"], Stub)
    assert not trap.exists()


def test_a_payload_in_a_bare_pickle_does_not_run_either(tmp_path):
    trap = tmp_path / "owned"
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"x": Payload(str(trap))}))
    with pytest.raises(UserError, match=r"a\.pt"):
        load_pickle_checkpoint(tmp_path / "a.pt")
    assert not trap.exists()


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(tmp_path / "a.pt"))
    with pytest.raises(UserError, match="TorchScript"):
        load_pickle_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_cut_short_is_one_sentence(tmp_path, zipped):
    path = tmp_path / "a.ckpt"
    torch.save({"w": torch.ones(10_000)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(UserError, match=r"a\.ckpt is cut short"):
        load_pickle_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"<html>", "web page"),
        (b"\x40\x00\x00\x00\x00\x00\x00\x00{}", r"end in \.safetensors"),
        (b"random bytes", "cut short or not"),
    ],
)
def test_a_file_that_is_something_else_is_named_for_what_it_is(tmp_path, content, sentence):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load_pickle_checkpoint(tmp_path / "a.pt")


def test_a_checkpoint_that_is_no_dict_and_a_missing_one_are_refused(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds a list"):
        load_pickle_checkpoint(tmp_path / "a.pt")
    with pytest.raises(UserError, match="does not exist"):
        load_pickle_checkpoint(tmp_path / "b.pt")


def test_saving_takes_a_view_without_the_tensor_behind_it(tmp_path):
    big = torch.arange(100_000.0)
    save_pickle_checkpoint(tmp_path / "a.ckpt", {"state_dict": {"w": big[:4]}, "epoch": 1, "list": [big[:2], 3]})
    assert (tmp_path / "a.ckpt").stat().st_size < 10_000
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert found["state_dict"]["w"].tolist() == [0, 1, 2, 3]
    assert found["list"][1] == 3
