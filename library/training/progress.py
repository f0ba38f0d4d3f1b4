"""The progress bar of a run, with log messages above it instead of across it."""

import logging
import sys
from collections.abc import Mapping

from tqdm import tqdm


class Progress:
    """Updates made, time left, updates per second, and figures behind them.

    Args:
        total: updates of the whole run.
        initial: updates made by the runs that this one continues.
        visible: False on all processes but the main one.
    """

    def __init__(self, total: int, initial: int, visible: bool) -> None:
        # A file or pipe keeps every redrawn line: redraw it rarely there.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=total, initial=initial, desc="steps", disable=not visible, mininterval=interval, maxinterval=interval * 10
        )
        self._handlers: list[_AboveBar] = []
        if visible:
            self._raise_messages()

    def start_clock(self) -> None:
        """Measure speed and time left from now on: what came before the first step was no training."""
        self._bar.unpause()

    def advance(self) -> None:
        """Count one update."""
        self._bar.update(1)

    def show(self, figures: Mapping[str, str]) -> None:
        """Set what stands behind the bar; it is drawn with the next update."""
        self._bar.set_postfix(figures, refresh=False)

    def close(self) -> None:
        """Draw the bar a last time, leave it standing, and let messages go their usual way again."""
        self._bar.close()
        root = logging.getLogger()
        for handler in self._handlers:
            if handler in root.handlers:
                root.removeHandler(handler)
                root.addHandler(handler.inner)
        self._handlers = []

    def _raise_messages(self) -> None:
        root = logging.getLogger()
        for inner in list(root.handlers):
            handler = _AboveBar(inner)
            root.removeHandler(inner)
            root.addHandler(handler)
            self._handlers.append(handler)


class _AboveBar(logging.Handler):
    """Takes the bar off the screen while another handler writes its message."""

    def __init__(self, inner: logging.Handler) -> None:
        super().__init__(inner.level)
        self.inner = inner

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            self.inner.handle(record)
