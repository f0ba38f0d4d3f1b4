"""How every script starts and ends: a person's mistake is a sentence and an exit status, never a traceback."""

import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from library.options.console import hold_messages, release_messages
from library.options.errors import UsageError, UserError

INTERRUPTED = 130
"""Exit status after Ctrl+C, as shells expect it."""
_WAIT_FOR_FIRST = 30.0
"""Seconds that a process gives the first one to tell what both found; launchers end all processes when one has ended."""


def run_script(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run `main` with the command line and end the process.

    Exit status: 0 when `main` returns; the `exit_status` of a `UserError`, whose text goes to standard error; 1 for a full
    disk; 130 after Ctrl+C. Anything else is a defect of ours and shows its traceback.
    """
    hold_messages()
    try:
        main(sys.argv[1:])
        status = 0
    except UserError as error:
        release_messages()
        status = error.exit_status
        if not error.is_found_by_all or _is_first_of_machine():
            sys.stderr.write(_told(error) + "\n")
        else:
            time.sleep(_WAIT_FOR_FIRST)
    except KeyboardInterrupt:
        release_messages()
        sys.stderr.write("Stopped.\n")
        status = INTERRUPTED
    except OSError as error:
        release_messages()
        if error.errno != errno.ENOSPC:
            raise
        sys.stderr.write(f"The disk is full{f': {error.filename}' if error.filename else ''}. Free some space and start again.\n")
        status = 1
    sys.exit(status)


def _is_first_of_machine() -> bool:
    """Files may differ between machines, so the first process of each tells what is wrong with them."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def _told(error: UserError) -> str:
    if isinstance(error, UsageError) and len(error.problems) > 1:
        return "\n".join([f"{len(error.problems)} mistakes:", *(f"- {problem}" for problem in error.problems)])
    return str(error)
