"""The most that tensors held on the GPU while a run trained, told at its end beside the forecast."""

import logging
from contextlib import suppress

import torch

from library.memory.sizes import gib
from library.options.groups.forecast import WHAT_MAKES_ROOM
from library.training.events import EventLog, RunEnd
from library.training.forecast import Forecast, needed_for
from library.training.forecast_beside import ForecastBeside
from library.training.position import Position

log = logging.getLogger(__name__)


def is_measured(device: torch.device) -> bool:
    """Tell whether the memory of a device is measured: where PyTorch's own allocator keeps a record."""
    return device.type == "cuda"


PATIENCE = 30.0
"""Seconds after its beginning until which a run that is complete waits for its forecast."""


class PeakMemory:
    """The observer that measures from where training begins: what filled caches before is not in it.

    The forecast is begun after the first update, told when it is there, and once more at the end.

    Args:
        device: a GPU.
        beside: the forecast of the run.
        events: of the run.
    """

    def __init__(self, device: torch.device, beside: ForecastBeside, events: EventLog) -> None:
        self._device = device
        self._beside = beside
        self._events = events
        self._has_begun = False
        self._is_told = beside.forecast is not None

    def before_training(self, position: Position) -> None:
        """Measure from here on."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._has_begun = True

    def after_update(self, position: Position) -> None:
        """Begin the forecast, or tell it as soon as it is there; the allocator keeps the record of what is measured."""
        self._beside.start()
        if not self._is_told and self._beside.forecast is not None:
            self._is_told = True
            total = torch.cuda.get_device_properties(self._device).total_memory
            level, said = told(self._beside.forecast, total)
            log.log(level, "%s", said)

    def after_epoch(self, position: Position) -> None:
        """The allocator keeps the record."""

    def after_training(self, position: Position) -> None:
        """What ends the run may need more, see `ended`."""

    def figures(self) -> dict[str, int | None] | None:
        """Return bytes that were `measured`, and `forecast` or None; None where training did not begin."""
        if not self._has_begun:
            return None
        forecast = self._beside.forecast
        expected = None if forecast is None else forecast.while_training
        return {"forecast": expected, "measured": torch.cuda.max_memory_allocated(self._device)}

    def ended(self, end: RunEnd) -> None:
        """Tell both on the console and to the events, however the run ended; a complete one waits a little for its forecast."""
        if end.outcome == "complete":
            with suppress(KeyboardInterrupt):  # who does not want to wait goes without
                self._beside.wait(PATIENCE)
        self._beside.stop()
        figures = self.figures()
        if figures is None:
            return
        log.info("%s", sentence(figures["measured"] or 0, figures["forecast"]))
        self._events.write("memory", **figures)


def told(forecast: Forecast, total: int) -> tuple[int, str]:
    """Say how a forecast compares with the memory of the GPU, and return how loud.

    Args:
        forecast: of the run.
        total: bytes that the GPU has.
    """
    needed = needed_for(forecast.while_training)
    most = forecast.most_while_training
    if needed <= total:
        return logging.INFO, f"Forecast: {gib(needed)} of the GPU's {gib(total)} are needed; {most} needs most."
    return logging.WARNING, (
        f"Forecast: {most} needs {gib(needed)}, and the GPU has {gib(total)}. Expect it to fail there, or to become very slow. "
        + WHAT_MAKES_ROOM
    )


def sentence(measured: int, forecast: int | None) -> str:
    """Say what was measured and how far the forecast was off; both in bytes."""
    said = f"Most that tensors held on the GPU while training: {gib(measured)}"
    if not forecast:
        return f"{said}."
    return f"{said}; {gib(forecast)} were forecast ({measured / forecast - 1:+.1%})."
