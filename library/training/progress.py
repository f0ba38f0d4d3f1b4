"""The progress bar of a run, with log messages above it instead of across it."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from tqdm import tqdm


class Progress:
    """Updates made, time left, updates per second, and figures behind them.

    Args:
        total: updates of the whole run.
        initial: updates made by the runs that this one continues.
        visible: False on all processes but the main one.
    """

    def __init__(self, total: int, initial: int, visible: bool) -> None:
        interval = bar_interval()
        self._bar = tqdm(
            total=total, initial=initial, desc="steps", disable=not visible, mininterval=interval, maxinterval=interval * 10
        )
        self._raised = ExitStack()
        if visible:
            self._raised.enter_context(messages_above_bars())

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
        self._raised.close()


def bar_interval() -> float:
    """Return the seconds between two drawings of a bar: a file or pipe keeps every redrawn line, so it is redrawn rarely there."""
    return 0.1 if sys.stderr.isatty() else 10.0


@contextmanager
def messages_above_bars() -> Iterator[None]:
    """While entered, log messages are written above any progress bar instead of across it."""
    root = logging.getLogger()
    raised = [_AboveBar(inner) for inner in list(root.handlers)]
    for handler in raised:
        root.removeHandler(handler.inner)
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in raised:
            if handler in root.handlers:
                root.removeHandler(handler)
                root.addHandler(handler.inner)


class _AboveBar(logging.Handler):
    """Takes the bar off the screen while another handler writes its message."""

    def __init__(self, inner: logging.Handler) -> None:
        super().__init__(inner.level)
        self.inner = inner

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            self.inner.handle(record)
