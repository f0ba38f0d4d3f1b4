"""How every script starts and ends: a person's mistake is a sentence and an exit status, never a traceback."""

import errno
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from library.options.console import hold_messages, release_messages
from library.options.errors import UsageError, UserError

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit status after Ctrl+C, as shells expect it."""
_WAIT_FOR_FIRST = 30.0
"""Most seconds that a process gives the first one to tell what both found; launchers end all processes when one has ended."""
_LOOKED_EVERY = 0.02
"""Seconds between two looks whether it has."""


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
            sys.stderr.flush()
            _let_others_go(error.is_found_by_all)
        else:
            _wait_for_first()
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


def _mark() -> Path | None:
    """Return the file that says that the first process has told, the same for all processes of a launch on this machine."""
    if "LOCAL_RANK" not in os.environ:
        return None
    return Path(tempfile.gettempdir()) / f"told-{os.getppid()}-{os.environ.get('MASTER_PORT', '')}"


def _let_others_go(found_by_all: bool) -> None:
    """Tell those who wait that they may end, for as long as it takes them to see it."""
    mark = _mark()
    if mark is None or not found_by_all or os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        return
    try:
        mark.touch()
        time.sleep(10 * _LOOKED_EVERY)
        mark.unlink(missing_ok=True)
    except OSError:
        log.debug("No mark could be made for the other processes; they wait until the launcher ends them.")


def _wait_for_first() -> None:
    end, mark = time.monotonic() + _WAIT_FOR_FIRST, _mark()
    while time.monotonic() < end and not (mark is not None and mark.exists()):
        time.sleep(_LOOKED_EVERY)


def _told(error: UserError) -> str:
    if isinstance(error, UsageError) and len(error.problems) > 1:
        return "\n".join([f"{len(error.problems)} mistakes:", *(f"- {problem}" for problem in error.problems)])
    return str(error)
