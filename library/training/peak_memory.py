"""The most that tensors held on the GPU while a run trained, told at its end beside the forecast."""

import logging

import torch

from library.memory.sizes import gib
from library.training.events import EventLog, RunEnd
from library.training.forecast import Forecast
from library.training.position import Position

log = logging.getLogger(__name__)


class PeakMemory:
    """The observer that measures from where training begins: what filled caches before is not in it.

    Args:
        device: a GPU.
        forecast: of the run, where one was made.
        events: of the run.
    """

    def __init__(self, device: torch.device, forecast: Forecast | None, events: EventLog) -> None:
        self._device = device
        self._forecast = None if forecast is None else forecast.while_training
        self._events = events
        self._has_begun = False

    def before_training(self, position: Position) -> None:
        """Measure from here on."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._has_begun = True

    def after_update(self, position: Position) -> None:
        """The allocator keeps the record."""

    def after_epoch(self, position: Position) -> None:
        """The allocator keeps the record."""

    def after_training(self, position: Position) -> None:
        """What ends the run may need more, see `ended`."""

    def figures(self) -> dict[str, int | None] | None:
        """Return bytes that were `measured`, and `forecast` or None; None where training did not begin."""
        if not self._has_begun:
            return None
        return {"forecast": self._forecast, "measured": torch.cuda.max_memory_allocated(self._device)}

    def ended(self, end: RunEnd) -> None:
        """Tell both on the console and to the events, however the run ended."""
        figures = self.figures()
        if figures is None:
            return
        log.info("%s", sentence(figures["measured"] or 0, self._forecast))
        self._events.write("memory", **figures)


def sentence(measured: int, forecast: int | None) -> str:
    """Say what was measured and how far the forecast was off; both in bytes."""
    said = f"Most that tensors held on the GPU while training: {gib(measured)}"
    if not forecast:
        return f"{said}."
    return f"{said}; {gib(forecast)} were forecast ({measured / forecast - 1:+.1%})."
