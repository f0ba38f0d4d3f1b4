"""What is counted is what computes, and a training step stays within the number of operations it was brought to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from tools import bench
from tools.bench_operations import OperationCounter, count_operations

RESULTS = Path(bench.__file__).resolve().parent.parent / "benchmarks" / "results"
MARGIN = 1.05


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


def written(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return result


@pytest.mark.parametrize(
    ("name", "target"),
    [("operations_lora.json", 7_500), ("operations_lora_checkpointing.json", 10_500)],
    ids=["plain", "checkpointing"],
)
def test_a_lora_step_of_the_real_size_takes_no_more_operations_than_the_committed_result_says(name: str, target: int) -> None:
    """The operations of each group of options are those of the result's own command."""
    result = written(name)
    options, before = result["options"], result["operations"]
    asked = BenchOptions(**options["bench"]), StepPrecisionOptions(**options["precision"]), OptimizerOptions(**options["optimizer"])
    assert (asked[0].size, asked[0].network_dim, asked[1].mixed_precision) == ("full", 32, "bf16")
    counted = count_operations(*asked)
    assert counted.step <= MARGIN * before["step"] and counted.step <= target, counted.most_frequent
    assert counted.update <= MARGIN * before["update"]


def test_the_documentation_has_the_committed_counts() -> None:
    page = (RESULTS.parent.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    for path in RESULTS.glob("operations_*.json"):
        found = written(path.name)["operations"]
        row = next(line for line in page.splitlines() if line.startswith(f"| `{path.name}` |"))
        assert row.endswith(f"| {found['step']:,} | {found['update']} |")
        assert written(path.name)["command"].endswith(f"--count_operations --json benchmarks/results/{path.name}")
