"""The commands as processes: help and mistakes answer before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from library.options.scripts import SCRIPTS

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "numpy", "bitsandbytes", "open_clip", "PIL"}

each_command = pytest.mark.parametrize("command", [script.script for script in SCRIPTS])


def run(command, *argv):
    """Run a command and return its result and the packages it imported."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", command, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    lines = result.stderr.splitlines()
    packages = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    return result, packages, [line for line in lines if not line.startswith("import time:")]


@each_command
def test_help_answers_without_importing_anything_heavy(command):
    result, packages, told = run(command, "--help")
    assert result.returncode == 0
    assert told == []
    assert command in result.stdout
    assert packages & HEAVY == set()


@each_command
def test_a_typing_error_answers_with_status_2_without_importing_anything_heavy(command):
    result, packages, told = run(command, "--console_log_levle", "INFO")
    assert result.returncode == 2
    assert "- --console_log_levle is not an option. Did you mean --console_log_level?" in told
    assert "Traceback" not in result.stderr
    assert packages & HEAVY == set()
