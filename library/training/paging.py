"""A warning when steps become slow while a GPU's memory is full: some drivers then move memory to the host instead of failing."""

import logging
from collections import deque
from statistics import median

import torch

from library.memory.sizes import gib
from library.options.groups.forecast import WHAT_MAKES_ROOM
from library.training.position import Position
from library.training.step_meter import StepMeter

log = logging.getLogger(__name__)

WARM_UP = 3
"""First steps that do not count: kernels are chosen and compiled in them."""
USUAL_OF = 20
"""Steps whose median is what a step usually takes; a quarter of them is enough to begin with."""
FULL = 0.95
"""Share of a GPU's memory from which on it is full: the rest is the driver's."""
JUMP = 3.0
"""Times the usual seconds; steps over the bus take several times as long, and pictures of another size seldom do."""
IN_A_ROW = 5
"""Slow steps before anything is said: one alone is a disk that was busy."""


class PagingSigns:
    """Judges the steps of a run one after another, from figures alone."""

    def __init__(self) -> None:
        self._to_skip = WARM_UP
        self._usual: deque[float] = deque(maxlen=USUAL_OF)
        self._slow: list[float] = []
        self._told = False

    def judge(self, seconds: float, reserved: int, total: int) -> str | None:
        """Return a sentence when the driver seems to page, once in a run.

        Args:
            seconds: that the step took.
            reserved: bytes that PyTorch holds on the GPU.
            total: bytes that the GPU has.
        """
        if self._told:
            return None
        if reserved > total:  # more than there is: no need to look at the clock
            return self._tell("PyTorch holds more than the GPU has", reserved, total)
        if self._to_skip:
            self._to_skip -= 1
            return None
        usual = median(self._usual) if len(self._usual) >= USUAL_OF // 4 else None
        if usual is None or seconds <= JUMP * usual or reserved < FULL * total:
            self._slow.clear()
            self._usual.append(seconds)
            return None
        self._slow.append(seconds)
        if len(self._slow) < IN_A_ROW:
            return None
        return self._tell(f"Steps take {median(self._slow):.2f} s, and took {usual:.2f} s before", reserved, total)

    def _tell(self, sign: str, reserved: int, total: int) -> str:
        self._told = True
        return (
            f"{sign}; the GPU's memory is full ({gib(reserved)} of {gib(total)}). Its driver probably moves "
            f"memory to the host and back, which makes training many times slower. {WHAT_MAKES_ROOM}"
        )


class PagingWatch:
    """The observer that has each step judged; it reads the allocator's own records, so that nothing waits for the device.

    The host is ahead of a GPU by some steps at most, so that its steps take as long as those of the GPU but come a little earlier.

    Args:
        meter: knows the step.
        device: a GPU.
    """

    def __init__(self, meter: StepMeter, device: torch.device) -> None:
        self._meter = meter
        self._total = torch.cuda.get_device_properties(device).total_memory
        self._signs = PagingSigns()

    def before_training(self, position: Position) -> None:
        """No step was made yet."""

    def after_update(self, position: Position) -> None:
        """Judge the step, before others do something between steps."""
        figures = self._meter.read()
        if said := self._signs.judge(figures.seconds, figures.reserved, self._total):
            log.warning("%s", said)

    def after_epoch(self, position: Position) -> None:
        """Steps count alike in all epochs."""

    def after_training(self, position: Position) -> None:
        """No step follows."""
