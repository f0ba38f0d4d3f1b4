#!/usr/bin/env python3
"""Set up Atelier and see it work, with nothing but Python 3.11 or later.

    python3 start.py demo            teach the toy in examples/toy a new word with a LoRA, and draw before and after
    python3 start.py test [ARGS]     run ruff, mypy, import-linter and every test; ARGS go to pytest

Both use the active virtual environment, or make `.venv` here, and install what is missing. Finished set-up is not done
again: a stamp beside the packages holds the hash of the requirement files it was made from. Everything the demo writes is
in `demo_output`. Ctrl+C stops at any moment; the same command goes on from there.
"""

from __future__ import annotations  # the version check below must be reached on any Python 3

import argparse
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_PYTHON = (3, 11)
DEMO_OUTPUT = "demo_output"
LORA_NAME = "toy_lora"
CHECKPOINT = "examples/toy/toy_sdxl.safetensors"
INTERRUPTED = 130  # what a shell reports for a command stopped by Ctrl+C


class SetupError(Exception):
    """A step did not work; the text says which and what to do.

    Args:
        sentence: what the person reads.
        exit_status: what the shell gets.
    """

    def __init__(self, sentence: str, exit_status: int = 1) -> None:
        super().__init__(sentence)
        self.exit_status = exit_status


def say(text: str) -> None:
    """Print one line of progress at once, also into a pipe."""
    print(text, flush=True)


def require_python(version: tuple[int, ...]) -> None:
    """Refuse a Python that is too old for the suite.

    Raises:
        SetupError: naming the version found and the one needed.
    """
    if version < OLDEST_PYTHON:
        raise SetupError(
            "Atelier needs Python {}.{} or later, and this is Python {}.{}. Install a newer one and run it by its name, "
            "for example: python3.11 start.py demo".format(*OLDEST_PYTHON, *version[:2]),
        )


# --- running other commands -------------------------------------------------------------------------------------------


def child_environment() -> dict[str, str]:
    """The environment of every command started here: no downloads from model hubs, output without delay, threads that wait asleep.

    OpenMP's threads wait for each other in a busy loop unless told otherwise. Where another program shares the cores, each wait
    then lasts until that program is suspended: steps of 0.2 s were measured to take 2 to 6 s.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def run(command: list[str], quiet: bool = False) -> int:
    """Run a command in the project's folder and return its exit status.

    On Ctrl+C the command gets the signal too (it belongs to the same terminal); it is given the time it needs to finish
    its step and save. A second Ctrl+C, or SIGTERM, ends it.

    Args:
        command: program and arguments.
        quiet: drop what it prints.

    Raises:
        KeyboardInterrupt: after the command has ended.
    """
    output = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(command, cwd=ROOT, env=child_environment(), stdout=output, stderr=output)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def run_step(title: str, command: list[str], advice: str) -> None:
    """Announce a step, run its command and say how long it took.

    Raises:
        SetupError: when the command fails; names the step, the command and the advice.
    """
    say(f"\n── {title}\n   {shlex.join(command)}")
    began = time.monotonic()
    status = run(command)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status != 0:
        raise SetupError(f"“{title}” stopped with exit status {status}. {advice}")
    say(f"   done in {time.monotonic() - began:.0f} s")


# --- set-up -----------------------------------------------------------------------------------------------------------


def python_in(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def active_environment() -> Path | None:
    """The virtual environment this command was started in, or None."""
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix)
    named = os.environ.get("VIRTUAL_ENV")
    return Path(named) if named and python_in(Path(named)).exists() else None


def make_environment(environment: Path) -> None:
    """Make a virtual environment, or make it anew where an earlier attempt was cut off.

    Raises:
        SetupError: when Python's venv module does not work here.
    """
    python = python_in(environment)
    if python.exists() and run([str(python), "-m", "pip", "--version"], quiet=True) == 0:
        return
    run_step(
        f"Make a virtual environment in {environment.name}",
        [sys.executable, "-m", "venv", "--clear", str(environment)],
        "On Debian and Ubuntu, `sudo apt install python3-venv` brings what is missing.",
    )


def requirements_hash(python: Path, files: list[str]) -> str:
    """Identify an installation: the requirement files' text, and the interpreter it was made for."""
    digest = hashlib.sha256(str(python).encode())
    for name in files:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def already_installed(python: Path, requirements: str) -> bool:
    """Whether an environment the person made holds everything asked for, in versions of their choice."""
    command = [str(python), "-m", "pip", "install", "--dry-run", "--no-index", "--disable-pip-version-check", "-r", requirements]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return answer.returncode == 0 and "Would install" not in answer.stdout


def install(environment: Path, requirements: str, own: bool) -> Path:
    """Install a requirements file and return the environment's interpreter; do nothing when that was done before.

    Args:
        environment: the virtual environment.
        requirements: file name, in the project's folder.
        own: the environment is ours, so it gets the tested versions; in another one, versions that are in range stay.

    Raises:
        SetupError: when pip fails.
    """
    python = python_in(environment)
    stamp = environment / f"atelier-{Path(requirements).stem}.installed"
    wanted = requirements_hash(python, ["requirements.txt", requirements, "constraints.txt"])
    if stamp.exists() and stamp.read_text() == wanted:
        say(f"Packages of {requirements} are installed in {environment}.")
        return python
    if own or not already_installed(python, requirements):
        run_step(
            f"Install the packages of {requirements} (the first time this downloads several GB)",
            [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-r", requirements, "-c", "constraints.txt"],
            "What pip says is above; no network and a full disk are the usual causes. The same command tries again.",
        )
    stamp.write_text(wanted)
    return python


def set_up(requirements: str) -> Path:
    """Make sure there is an environment that holds `requirements`, and return its interpreter."""
    active = active_environment()
    environment = active or ROOT / ".venv"
    own = active is None or active == ROOT / ".venv"
    say(f"Python environment: {environment}" + ("" if own else " (the active one)"))
    if active is None:
        make_environment(environment)
    return install(environment, requirements, own)


# --- demo -------------------------------------------------------------------------------------------------------------


def draw(python: Path, title: str, folder: Path, extra: list[str]) -> None:
    """Draw the example prompts into an emptied folder, with fixed seeds."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [str(python), "sdxl_gen_img.py", "--ckpt", CHECKPOINT, "--from_file", "examples/toy/prompts.txt"]
    command += ["--outdir", str(folder), "--sequential_file_name", "--batch_size", "8", "--sampler", "euler", *extra]
    run_step(title, command, "Its message is above.")


def demo() -> None:
    """Teach the toy a new word with a LoRA, draw before and after, tell how well it went, and say where the results are."""
    python = set_up("requirements.txt")
    began = time.monotonic()
    output = ROOT / DEMO_OUTPUT
    output.mkdir(exist_ok=True)
    lora, grid = output / f"{LORA_NAME}.safetensors", output / "before_after.png"
    draw(python, "Draw eight prompts, four of them with a word the toy does not know", output / "before", [])
    training = ["sdxl_train_network.py", "--config_file", "examples/toy/training.toml"]
    training += ["--pretrained_model_name_or_path", CHECKPOINT, "--output_dir", str(output), "--output_name", LORA_NAME]
    run_step("Train a LoRA on twelve pictures of what the word means", [str(python), *training], "Its message is above.")
    network = ["--network_module", "networks.lora", "--network_weights", str(lora), "--network_mul", "1.0"]
    draw(python, "Draw the same prompts with the LoRA, from the same seeds", output / "after", network)
    rows = [f"before={output / 'before'}", f"after={output / 'after'}"]
    run_step("Put both rows into one picture", [str(python), "tools/make_grid.py", str(grid), *rows], "Its message is above.")
    judge = ["examples/toy/evaluate.py", "--network_weights", str(lora), "--number", "20"]
    run_step("Draw more, and read from the pixels whether the word was learned", [str(python), *judge], "Its message is above.")
    say(f"\nThe demo took {time.monotonic() - began:.0f} s.\nLoRA:             {lora}\nBefore and after: {grid}")


# --- test -------------------------------------------------------------------------------------------------------------


def checks(python: Path) -> dict[str, list[str]]:
    """The checks that come before the tests, by the name a person knows them by."""
    scripts = python.parent
    return {
        "ruff check": [str(python), "-m", "ruff", "check", "."],
        "ruff format": [str(python), "-m", "ruff", "format", "--check", "."],
        "mypy": [str(python), "-m", "mypy"],
        "import-linter": [str(scripts / "lint-imports")],
    }


def test(pytest_arguments: list[str]) -> int:
    """Run every check and every test; 0 only when all of them pass. Pytest comes last, so its summary is the last line.

    Args:
        pytest_arguments: passed on, for example `tests/files -x`.
    """
    python = set_up("requirements-dev.txt")
    failed = []
    for name, command in checks(python).items():
        say(f"\n── {name}")
        if run(command) != 0:
            failed.append(name)
    result = f"failed: {', '.join(failed)} (the exit status will be 1)" if failed else "all checks passed"
    say(f"\n── {result}; now the tests")
    workers = min(os.cpu_count() or 1, 4)
    status = run([str(python), "-m", "pytest", "-n", str(workers), "--dist", "worksteal", *pytest_arguments])
    return status or int(bool(failed))


# --- command line -----------------------------------------------------------------------------------------------------


def read_command_line(argv: list[str]) -> tuple[str, list[str]]:
    """Return the command's name and what follows it; unknown words end with exit status 2 and the usage."""
    parser = argparse.ArgumentParser(prog="start.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,test}")
    commands.add_parser("demo", help="teach the toy a new word and draw before and after")
    commands.add_parser("test", help="run every check and every test", add_help=False)
    known, rest = parser.parse_known_args(argv)
    if known.command == "demo" and rest:
        parser.error(f"demo takes no arguments, received: {' '.join(rest)}")
    return known.command, rest


def end_on_sigterm() -> None:
    """Let SIGTERM unwind like an exception, so that the command in work is ended as well."""

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)


def main(argv: list[str]) -> int:
    """Run one command and return the exit status."""
    try:
        require_python(sys.version_info[:2])
        command, rest = read_command_line(argv)
        end_on_sigterm()
        if command == "test":
            return test(rest)
        demo()
        return 0
    except SetupError as error:
        say(f"\n{error}")
        return error.exit_status
    except KeyboardInterrupt:
        say("\nStopped. The same command goes on from here; finished steps of the set-up are kept.")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
