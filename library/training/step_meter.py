"""How long an update took and how much memory the run has needed, read without waiting for the device."""

import time
from typing import NamedTuple

import psutil
import torch

from library.training.position import Position


class StepFigures(NamedTuple):
    """Of one update."""

    seconds: float
    """As the host saw it; saving, validation and sample images are not in it."""
    memory: int
    """Bytes: the most that tensors held on a GPU since training began; on other devices the memory of the process."""
    reserved: int = 0
    """Bytes that PyTorch holds on a GPU, for tensors and between them; 0 on other devices."""


class StepMeter:
    """The observer that is called last, so that what the others do between updates counts for none.

    Args:
        device: that trains.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._process = psutil.Process()
        self._began = time.perf_counter()

    def read(self) -> StepFigures:
        """Return the figures of the update that was just made."""
        seconds = time.perf_counter() - self._began
        if self._device is not None:
            records = torch.cuda.memory_stats(self._device)
            return StepFigures(seconds, records.get("allocated_bytes.all.peak", 0), records.get("reserved_bytes.all.current", 0))
        return StepFigures(seconds, self._process.memory_info().rss)

    def before_training(self, position: Position) -> None:
        """The first update begins."""
        self._began = time.perf_counter()

    def after_update(self, position: Position) -> None:
        """The next update begins."""
        self._began = time.perf_counter()

    def after_epoch(self, position: Position) -> None:
        """The next update begins."""
        self._began = time.perf_counter()

    def after_training(self, position: Position) -> None:
        """No update follows."""
