"""Copies between main memory and a device that run beside the computation, and memory that is made once for them."""

from typing import Any, Protocol

import torch
from torch import Tensor

ARENA = 2**29
"""Bytes of pinned memory asked for at a time: PyTorch rounds each request up to a power of two, and pinning takes long."""
ALIGNMENT = 512
"""Bytes; every tensor begins at a multiple, as PyTorch's own allocator has it."""

Mark = Any
"""A point in the work of the device, which other work can wait for; None where the program's order is the work's order."""


class Transfers(Protocol):
    """Two lanes beside the computation, one in each direction."""

    def mark(self) -> Mark:
        """Return the point that the computation has reached: everything asked of the device so far."""

    def bring(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Copy from main memory to the device once a point is reached, and return the end of the copy; one follows the other."""

    def take_away(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Copy from the device to main memory once a point is reached, and return the end of the copy; one follows the other."""

    def compute_after(self, mark: Mark) -> None:
        """Let whatever is computed from now on begin after a point; the host does not wait."""

    def wait(self, mark: Mark) -> None:
        """Let the host wait until a point is reached."""


class InTurn:
    """Copies at once, where there is nothing to run beside: without a GPU, and under fake tensors."""

    def mark(self) -> Mark:
        """There is nothing to wait for."""

    def bring(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Copy."""
        target.copy_(source)

    def take_away(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Copy."""
        target.copy_(source)

    def compute_after(self, mark: Mark) -> None:
        """The copy was made already."""

    def wait(self, mark: Mark) -> None:
        """The copy was made already."""


class BesideComputation:
    """Copies on two streams of a GPU, so that both directions of the bus are used at once.

    The buffers are made once and never given back while copies run, so PyTorch's allocator need not be told of these streams.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward = torch.cuda.Stream(device)
        self._outward = torch.cuda.Stream(device)
        start = torch.cuda.current_stream(device)  # buffers that were used for something else before are free from here on
        self._inward.wait_stream(start)
        self._outward.wait_stream(start)

    def mark(self) -> Mark:
        """Return an event of the stream that computes."""
        return torch.cuda.current_stream(self._device).record_event()

    def bring(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Copy on the inward stream."""
        return self._copy(self._inward, target, source, after)

    def take_away(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Copy on the outward stream."""
        return self._copy(self._outward, target, source, after)

    def compute_after(self, mark: Mark) -> None:
        """Let the computing stream wait for an event."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def wait(self, mark: Mark) -> None:
        """Wait for an event."""
        if mark is not None:
            mark.synchronize()

    def _copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor, after: Mark) -> Mark:
        stream.wait_event(after)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return stream.record_event()


class Arena:
    """Main memory handed out in pieces that are never given back.

    Args:
        is_pinned: whether a GPU is to copy from and to it by itself.
    """

    def __init__(self, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """Return `size` bytes, uint8 (size,)."""
        if not self._is_pinned:
            return torch.empty(size, dtype=torch.uint8)
        if self._rest.numel() < size:
            self._rest = torch.empty(max(ARENA, size), dtype=torch.uint8, pin_memory=True)
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


def transfers_of(device: torch.device) -> Transfers:
    """Return the way in which a device's copies are made."""
    return BesideComputation(device) if device.type == "cuda" else InTurn()
