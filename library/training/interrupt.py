"""Ctrl+C and a polite kill finish the step and save; a second Ctrl+C stops at once."""

import logging
import os
import signal
import time
from types import FrameType, TracebackType

import torch.distributed
from torch import Tensor

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO_SECONDS = 2.0
"""Launchers of several processes pass on a Ctrl+C that the terminal has sent to every process already: that is no second one."""


class StopRequest:
    """While entered, turns the first SIGINT or SIGTERM into a request the loop answers between two updates."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.agreed = False
        """Whether all processes have agreed to stop; changes only inside `poll`, so that every process sees the same value."""
        self._asked_at = 0.0
        self._is_launched = "LOCAL_RANK" in os.environ
        self._owner = os.getpid()
        self._previous: dict[int, object] = {}
        self._group: torch.distributed.ProcessGroup | None = None

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # A group of its own on the CPU: agreeing on the flag must not make a GPU wait.
            self._group = torch.distributed.new_group(backend="gloo")  # type: ignore[assignment]  # every process is a member
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked loader worker: the main process decides about Ctrl+C, a kill means this worker alone.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.signal is not None:
            if self._is_launched and time.monotonic() - self._asked_at < _ECHO_SECONDS:
                return
            raise KeyboardInterrupt
        self.signal, self._asked_at = number, time.monotonic()
        log.warning(
            "Stopping after this step and saving; press Ctrl+C again to stop at once and lose the steps since the last save."
        )

    def poll(self) -> bool:
        """Return whether any process of the run was asked to stop; a collective call, and all processes get the same answer."""
        if self._group is not None:
            flag: Tensor = torch.tensor([self.signal or 0])
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self._group)
            self.signal = int(flag.item()) or None
        self.agreed = self.signal is not None
        return self.agreed
