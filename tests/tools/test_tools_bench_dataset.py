"""The measurement of indexing and planning, at sizes that take no time."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_both_starts_with_files_and_without(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = ["tools/bench_dataset.py", "--images", "60", "--without_files", "500", "--repeat", "1", "--json", str(report)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["60", "500"]
    told = json.loads(report.read_text())
    assert told["command"] == command
    for row, has_files in zip(told["results"], (True, False), strict=True):
        assert row["files"] is has_files
        assert row["second_us"] > 0
        assert row["plan_us"] > 0
    with_files = told["results"][0]
    assert with_files["second_cpu_us"] < with_files["first_cpu_us"]  # what is remembered is not read
