"""Where messages go."""

import importlib.util
import logging
import logging.handlers
import os
import sys

from library.options.errors import UsageError
from library.options.groups.console import ConsoleOptions

_CHATTY = ("bitsandbytes",)
"""Packages whose warnings are about choices that nobody using these scripts has."""

_PLAIN = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")


def hold_messages() -> None:
    """Keep messages until `set_up_logging` knows where they go, or `release_messages` shows them."""
    _install(logging.handlers.MemoryHandler(1000, flushLevel=logging.CRITICAL + 1), logging.INFO)


def set_up_logging(console: ConsoleOptions) -> None:
    """Send messages where `--console_log_*` says, those that were held before included.

    Without such options they go to standard error: coloured on a terminal that has the `rich` package, plain lines otherwise. Of
    several processes only the first shows messages below errors, and has the file.

    Raises:
        UsageError: `--console_log_file` cannot be written.
    """
    level = logging.getLevelNamesMapping()[console.console_log_level or "INFO"]
    if int(os.environ.get("RANK", "0")) > 0:
        level = max(level, logging.ERROR)
    for package in _CHATTY:
        logging.getLogger(package).setLevel(logging.ERROR)
    _install(_handler(console), level)


def release_messages() -> None:
    """Show held messages as plain lines, if `set_up_logging` was never reached."""
    if any(isinstance(handler, logging.handlers.MemoryHandler) for handler in logging.getLogger().handlers):
        set_up_logging(ConsoleOptions())


def say(text: str) -> None:
    """Print a text to standard output at once, with escapes for letters that cannot be shown there.

    Where the reader has hung up, as `head` does when it has seen enough, the work goes on in silence.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer is flushed at the end


def _handler(console: ConsoleOptions) -> logging.Handler:
    handler: logging.Handler
    if console.console_log_file and os.environ.get("RANK", "0") == "0":
        try:
            handler = logging.FileHandler(console.console_log_file, mode="w", encoding="utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(
                [f"--console_log_file {console.console_log_file} cannot be written ({reason}). Choose another one."]
            ) from None
    elif console.console_log_simple:
        handler = logging.StreamHandler(sys.stdout)
    elif sys.stderr.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.logging import RichHandler

        return RichHandler(console=Console(stderr=True), show_path=False)
    else:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PLAIN)
    return handler


def _install(handler: logging.Handler, level: int) -> None:
    """Replace the handler installed before, passing on what it held; handlers of others stay."""
    root = logging.getLogger()
    for earlier in [known for known in root.handlers if getattr(known, "is_ours", False)]:
        root.removeHandler(earlier)
        if isinstance(earlier, logging.handlers.MemoryHandler):
            earlier.buffer, held = [], earlier.buffer
            for record in held:
                if record.levelno >= level:
                    handler.handle(record)
        earlier.close()
    handler.is_ours = True  # type: ignore[attr-defined]  # a mark of our own
    root.addHandler(handler)
    root.setLevel(level)
