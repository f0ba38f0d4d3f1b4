"""The measurement of indexing and planning, at sizes that take no time."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools import bench_dataset


def test_it_measures_both_starts_with_files_and_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = bench_dataset.in_own_process
    in_process: list[str] = []

    def measured(kind: str, folder: str, count: int) -> dict[str, Any]:
        """Measure in this process, but for one kind: each process of its own loads torch."""
        if kind == "second_made_up":
            return own(kind, folder, count)
        in_process.append(kind)
        return bench_dataset.measured(kind, folder, count)

    monkeypatch.setattr(bench_dataset, "in_own_process", measured)
    report = tmp_path / "report.json"
    command = ["--images", "60", "--without_files", "500", "--repeat", "1", "--json", str(report)]
    bench_dataset.main(command)
    assert in_process == ["first", "second", "first_made_up"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["60", "500"]
    told = json.loads(report.read_text())
    assert told["command"] == ["tools/bench_dataset.py", *command]
    for row, has_files in zip(told["results"], (True, False), strict=True):
        assert row["files"] is has_files
        assert row["second_us"] > 0
        assert row["plan_us"] > 0
    with_files = told["results"][0]
    assert with_files["second_cpu_us"] < with_files["first_cpu_us"]  # what is remembered is not read
