"""The command that continues a run that was stopped, without secrets."""

import os
import sys
from collections.abc import Iterator, Sequence

SECRETS = ("--huggingface_token", "--wandb_api_key")
"""Options whose values are never shown."""
_SHORTEST = len("--wandb_")
"""Beginnings of this length, and shorter ones, may mean several options."""


def resume_command(state: object, num_processes: int) -> list[str]:
    """Return the words that continue this run from a state.

    Args:
        state: the state's folder.
        num_processes: of the run.
    """
    kept = without_options(sys.argv, values=["--resume", *SECRETS], flags=["--resume_from_huggingface"])
    return [*launcher(num_processes), *kept, "--resume", str(state)]


def secrets_given() -> list[str]:
    """Return the options with a secret that were typed, and that the command must be given again."""
    return [option for option in SECRETS if without_options(sys.argv, values=[option]) != sys.argv]


def launcher(num_processes: int) -> list[str]:
    """Return the words that start a script the way this process was started."""
    if "ACCELERATE_DYNAMO_BACKEND" in os.environ:  # accelerate launch sets it, nothing else does
        return ["accelerate", "launch", *(["--num_processes", str(num_processes)] if num_processes > 1 else [])]
    return ["python"] if num_processes == 1 else ["torchrun", "--nproc_per_node", str(num_processes)]


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
