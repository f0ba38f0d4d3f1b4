"""What is counted is what computes, and a training step stays within the number of operations it was brought to."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tools import bench
from tools.bench_operations import OperationCounter


def test_views_and_new_memory_are_free_and_everything_else_counts_once() -> None:
    x = torch.ones(4, 6, requires_grad=True)
    with OperationCounter() as counter:
        y = F.linear(x.view(6, 4).t().detach(), torch.empty(3, 6)) * 2
        y.add_(1)
        (x * 3).sum().backward()
    assert counter.counts == {"mm": 1, "mul": 3, "add_": 1, "sum": 1, "ones_like": 1}


def test_operations_are_counted_without_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "operations.json"
    bench.main(["--size", "tiny", "--resolution", "64", "--count_operations", "--json", str(file)])
    written = json.loads(file.read_text())
    assert "result" not in written
    operations = written["operations"]
    assert operations["step"] == sum(operations["most_frequent"].values())
    assert operations["most_frequent"]["native_layer_norm"] > 0
    assert 0 < operations["update"] < 20  # fused AdamW, and the norm of all gradients together
    shown = capsys.readouterr().out
    assert f"{operations['step']:,} in forward and backward pass" in shown and "s/step" not in shown
