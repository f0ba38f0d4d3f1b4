"""The command that continues a run that was stopped."""

import os
import sys
from collections.abc import Sequence


def resume_command(state: object, num_processes: int) -> list[str]:
    """Return the words that continue this run from a state.

    Args:
        state: the state's folder.
        num_processes: of the run.
    """
    return [*launcher(num_processes), *without_option(sys.argv, "--resume"), "--resume", str(state)]


def launcher(num_processes: int) -> list[str]:
    """Return the words that start a script the way this process was started."""
    if "ACCELERATE_DYNAMO_BACKEND" in os.environ:  # accelerate launch sets it, nothing else does
        return ["accelerate", "launch", *(["--num_processes", str(num_processes)] if num_processes > 1 else [])]
    return ["python"] if num_processes == 1 else ["torchrun", "--nproc_per_node", str(num_processes)]


def without_option(words: Sequence[str], option: str) -> list[str]:
    """Return a command line without an option and its value, in both spellings."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip or word.startswith(f"{option}="):
            skip = False
        elif word == option:
            skip = True
        else:
            kept.append(word)
    return kept
