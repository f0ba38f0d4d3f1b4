"""The command that continues a run that was stopped, without secrets."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from library.options.record import options_of
from library.options.scripts import ScriptOptions

_SHORTEST = len("--wandb_")
"""Beginnings of this length, and shorter ones, may mean several options."""


def resume_command(script: type[ScriptOptions], state: object, num_processes: int) -> list[str]:
    """Return the words that continue this run from a state.

    Args:
        script: whose options the command line has.
        state: the state's folder.
        num_processes: of the run.
    """
    kept = without_options(sys.argv, values=["--resume", *_secrets(script)], flags=["--resume_from_huggingface"])
    return [*launcher(num_processes), *kept, "--resume", str(state)]


def secrets_given(script: type[ScriptOptions]) -> list[str]:
    """Return the options with a secret that were typed, and that the command must be given again."""
    return [option for option in _secrets(script) if without_options(sys.argv, values=[option]) != sys.argv]


def _secrets(script: type[ScriptOptions]) -> list[str]:
    return [option.flag for option in options_of(script).values() if option.is_secret]


def launcher(num_processes: int) -> list[str]:
    """Return the words that start a script the way this process was started.

    They are read off the launcher, which is still running; where they cannot be, they are made up from what launchers tell.
    """
    if "LOCAL_RANK" not in os.environ and "ACCELERATE_DYNAMO_BACKEND" not in os.environ:  # which launchers set
        return ["python"]
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        words = []
    return words_before_script(words, sys.argv[0]) or _likely_launcher(num_processes)


def words_before_script(words: Sequence[str], script: str) -> list[str]:
    """Return the words with which a launcher was started, up to the script; nothing where it started another one.

    Args:
        words: of its command line, the interpreter first.
        script: as it was typed.
    """
    if script not in words:
        return []
    head = list(words[: words.index(script)])
    program = next((place for place, word in enumerate(head) if Path(word).stem in ("accelerate", "torchrun")), None)
    if program is not None:
        return [Path(head[program]).stem, *head[program + 1 :]]
    return ["python", *head[1:]] if "-m" in head else []


def _likely_launcher(num_processes: int) -> list[str]:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    machines = num_processes // here
    rank, address, port = (os.environ.get(name, "0") for name in ("GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"))
    if "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        nodes = ["--num_machines", str(machines), "--machine_rank", rank, "--main_process_ip", address, "--main_process_port", port]
        count = ["--num_processes", str(num_processes)] if num_processes > 1 else []
        return ["accelerate", "launch", *(nodes if machines > 1 else []), *count]
    if num_processes == 1:
        return ["python"]
    nodes = ["--nnodes", str(machines), "--node_rank", rank, "--master_addr", address, "--master_port", port]
    return ["torchrun", *(nodes if machines > 1 else []), "--nproc_per_node", str(here)]


def without_options(words: Sequence[str], *, values: Sequence[str] = (), flags: Sequence[str] = ()) -> list[str]:
    """Return a command line without some options.

    Args:
        words: the command line.
        values: options that have a value, in both spellings.
        flags: options that have none.
    """

    def kept() -> Iterator[str]:
        rest = iter(words)
        for word in rest:
            if _is_one_of(word, values):
                if "=" not in word:
                    next(rest, None)
            elif not _is_one_of(word, flags):
                yield word

    return list(kept())


def _is_one_of(word: str, options: Sequence[str]) -> bool:
    """Say whether a word is one of these options, or so much of its name that it can be no other."""
    name = word.partition("=")[0]
    return any(name == option or (len(name) > _SHORTEST and option.startswith(name)) for option in options)
