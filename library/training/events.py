"""What happens in a run, one JSON object per line, for programs that watch it (`--log_events`).

Every line has `kind` and `time` (Unix seconds); docs/watching.md lists the kinds and their fields. Nothing here waits for a
device: the log hands over numbers that have arrived. A file that cannot be written costs the events, never the run.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from library.options.errors import UserError

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
"""Goes up when a field changes its meaning or goes away; new kinds and fields leave it as it is."""


@dataclass(frozen=True)
class RunEnd:
    """How a run ended."""

    outcome: str
    """`complete`, `stopped` (by a signal, after saving) or `failed`."""
    message: str | None
    """What went wrong, where something did."""
    seconds: float
    """Since the run began."""


class EventLog:
    """Appends events to a file; without one, and in processes that were given none, it does nothing.

    Args:
        path: of the file; its folder is made.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.at_end: list[Callable[[RunEnd], None]] = []
        """Called once when the run is over, before the last event is written."""
        self._path = path
        self._file: TextIO | None = None
        self._complaints = _Complaints(self)
        if path is not None:
            self._attempt(lambda: self._open(path))

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event.

        Args:
            kind: of event.
            fields: what JSON can hold; other objects become text, and numbers that are not finite become null.
        """
        file = self._file
        if file is None:
            return
        line = json.dumps(plain({"kind": kind, "time": round(time.time(), 3), **fields}), ensure_ascii=False)
        self._attempt(lambda: _append(file, line))

    def close(self) -> None:
        """Close the file; what is written afterwards is dropped."""
        logging.getLogger().removeHandler(self._complaints)
        file, self._file = self._file, None
        if file is not None:
            self._attempt(file.close)

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_torn = _ends_within_a_line(path)
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        logging.getLogger().addHandler(self._complaints)
        if is_torn:
            self._file.write("\n")

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            logging.getLogger().removeHandler(self._complaints)
            self._file = None  # first, so that the warning is not written to it
            log.warning("--log_events %s cannot be written (%s); the run goes on without it.", self._path, error.strerror)


class _Complaints(logging.Handler):
    """Makes an event of everything that is logged as a warning or an error."""

    def __init__(self, events: EventLog) -> None:
        super().__init__(logging.WARNING)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        kind = "error" if record.levelno >= logging.ERROR else "warning"
        self._events.write(kind, message=record.getMessage())


@contextmanager
def events_of_run(path: Path | None) -> Iterator[EventLog]:
    """Give the event log of a run, and write how the run ended when the block is left.

    Args:
        path: of the file, or None; of several processes the first alone writes.
    """
    began = time.monotonic()
    events = EventLog(path if int(os.environ.get("RANK", "0")) == 0 else None)

    def end(outcome: str, message: str | None = None) -> None:
        over = RunEnd(outcome, message, round(time.monotonic() - began, 3))
        for tell in events.at_end:
            tell(over)
        events.write("end", outcome=over.outcome, message=over.message, seconds=over.seconds)
        events.close()

    try:
        yield events
    except (SystemExit, KeyboardInterrupt):
        end("stopped")
        raise
    except BaseException as error:
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        events.write("error", message=message)
        end("failed", message)
        raise
    end("complete")


def _append(file: TextIO, line: str) -> None:
    file.write(line + "\n")
    file.flush()


def _ends_within_a_line(path: Path) -> bool:
    """Tell whether a file ends without a line's end, as a run leaves it that was killed while writing."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def plain(value: Any) -> Any:
    """Return what JSON can hold, so that no event is lost to a value."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value)
