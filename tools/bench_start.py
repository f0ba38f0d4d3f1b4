"""Measure how long a training command takes until its first step, and the memory it needs until then.

    python tools/bench_start.py --json start.json -- sdxl_train_network.py --config_file run.toml

The command is run as it stands, for one step, and writes into the output folder it names. Memory is the process's anonymous memory
(RssAnon), sampled every few milliseconds: pages of memory-mapped files are left out, since the system takes them back whenever it
needs them. Seconds of the processor are told beside those of the clock, which other programs lengthen. Linux only.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from library.files.atomic import atomic_write_text
from library.options.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
_SAMPLE_SECONDS = 0.01


def main(argv: Sequence[str]) -> None:
    """Run the command, print what was measured, and write the JSON where asked.

    Raises:
        UserError: the command does not come to its first step.
    """
    arguments = command_line().parse_args(argv)
    result = measure(arguments.command)
    if arguments.json:
        import torch

        from library.training.environment import hardware, installed_versions

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        told = shlex.join(["python", "tools/bench_start.py", *argv])
        facts = {"command": told, "result": result, "hardware": hardware(device), "versions": installed_versions()}
        atomic_write_text(arguments.json, json.dumps(facts, indent=2) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the result")
    parser.add_argument("command", nargs="+", help="a training script of this project and its arguments, after --")
    return parser


def measure(command: Sequence[str]) -> dict[str, Any]:
    """Run a training command for one step.

    Args:
        command: script and arguments.

    Returns:
        Seconds of the clock and of the processor from the command to the beginning of training and to the end of its first step,
        and peak bytes until each.

    Raises:
        UserError: the command ended before.
    """
    with tempfile.TemporaryDirectory() as folder:
        events, said = Path(folder) / "events.jsonl", Path(folder) / "said"
        line = [sys.executable, *command, "--max_train_steps", "1", "--log_events", str(events)]
        began = time.time()
        with said.open("wb") as out, subprocess.Popen(line, cwd=ROOT, stdout=out, stderr=out) as process:
            found = _watch(process, events, began)
        if process.returncode or found.keys() != {"start", "step"}:
            raise UserError(f"The command did not come to its first step:\n{said.read_text(errors='replace')[-2000:]}")
    return {"training_begins": found["start"], "first_step_ends": found["step"]}


def _watch(process: subprocess.Popen[bytes], events: Path, began: float) -> dict[str, dict[str, float]]:
    """Look at a process until it has made a step or ended; returns the seconds and bytes until its start and until that step."""
    peak = 0
    found: dict[str, dict[str, float]] = {}
    while process.poll() is None and "step" not in found:
        peak = max(peak, _anonymous_bytes(process.pid))
        worked = _processor_seconds(process.pid)
        first = {event["kind"]: event for event in reversed(_events(events))}
        for kind in {"start", "step"} & first.keys() - found.keys():
            seconds = round(first[kind]["time"] - began, 2)
            found[kind] = {"seconds": seconds, "processor_seconds": worked, "peak_bytes": peak}
        time.sleep(_SAMPLE_SECONDS)
    return found


def _events(path: Path) -> list[dict[str, Any]]:
    """Read the events that are there, whole lines only."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _anonymous_bytes(process: int) -> int:
    """Return the anonymous memory of a process; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text("ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def _processor_seconds(process: int) -> float:
    """Return the time that a process and its threads have computed; 0 where it has ended."""
    try:
        times = psutil.Process(process).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return round(float(times.user + times.system), 2)


if __name__ == "__main__":
    from library.options.entry import run_script

    run_script(main)
