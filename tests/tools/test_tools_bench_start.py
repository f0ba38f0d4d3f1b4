"""The measurement of the start of a run, with scripts that do nothing but tell where they are."""

from pathlib import Path

import pytest

from library.options.errors import UserError
from tools.bench_start import measure

SCRIPT = """
import json, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert given["--max_train_steps"] == "1"
def tell(kind):
    with open(given["--log_events"], "a") as file:
        print(json.dumps({"kind": kind, "time": time.time()}), file=file)
memory = bytearray(b"x" * 30_000_000)
time.sleep(0.2)
tell("start")
memory += bytearray(b"x" * 30_000_000)
time.sleep(0.2)
tell("step")
time.sleep(0.2)
"""


def test_seconds_and_memory_are_those_until_training_begins_and_until_its_first_step(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    told = measure([str(script)])
    begins, ends = told["training_begins"], told["first_step_ends"]
    assert 0.2 < begins["seconds"] < ends["seconds"] - 0.15
    assert begins["peak_bytes"] > 30_000_000 and ends["peak_bytes"] > begins["peak_bytes"] + 25_000_000
    assert 0 < begins["processor_seconds"] <= ends["processor_seconds"]


def test_a_command_that_does_not_come_to_its_first_step_says_why(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no such model')")
    with pytest.raises(UserError, match="no such model"):
        measure([str(script)])
