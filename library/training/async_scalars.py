"""Numbers that leave the device without anybody waiting for them."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class AsyncScalars:
    """Numbers on their way from the device: `push` never waits, `ready` gives those that have arrived, in order.

    On the CPU a number arrives at once. On CUDA it is copied to pinned memory behind the kernels already queued, and an event
    tells when it is there. Other devices are read directly, which waits for them.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Any, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, tag: Any, value: Tensor) -> None:
        """Send a number off.

        Args:
            tag: comes back with the number.
            value: of any shape, on any device; it may be overwritten later on the same stream.
        """
        value = value.detach()
        if value.is_cuda:
            landing = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            landing.copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(value.device))
            self._pending.append((tag, landing, event))
        else:
            self._pending.append((tag, value.to("cpu", copy=True), None))

    def ready(self) -> Iterator[tuple[Any, Any]]:
        """Yield tag and number (lists of numbers where there are axes) of what has arrived, oldest first, without waiting."""
        while self._pending and (self._pending[0][2] is None or self._pending[0][2].query()):
            tag, value, _ = self._pending.popleft()
            yield tag, value.tolist()

    def drain(self, keep: int = 0) -> Iterator[tuple[Any, Any]]:
        """Yield what was sent off but for the `keep` latest, waiting for what is still on its way."""
        while len(self._pending) > keep:
            tag, value, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            yield tag, value.tolist()
