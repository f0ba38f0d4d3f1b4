"""What fake tensors are made of where a run is only forecast."""

from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from library.files.tensors import open_tensors, save_tensors
from library.memory.pretend import fake_tensors


def test_files_give_shapes_and_types_without_values(tmp_path: Path) -> None:
    path, values = tmp_path / "net.safetensors", torch.rand(3, 2, dtype=torch.float16)
    save_tensors(path, {"weight": values}, None)
    with fake_tensors():
        (read,) = dict(open_tensors(path)).values()
        layer = nn.Linear(2, 3, bias=False, dtype=torch.float16)
        layer.load_state_dict({"weight": read})
        assert isinstance(read, FakeTensor) and isinstance(layer.weight, FakeTensor)
        assert (read.shape, read.dtype) == (values.shape, values.dtype)
    assert torch.equal(open_tensors(path)["weight"], values)
