"""What a forward pass keeps for the backward pass, kept in main memory: the device holds one piece of it at a time.

Meant for a module with gradient checkpointing, which keeps little to begin with: the inputs of its blocks. Copies run on a stream
of their own beside the computation, into pinned memory. Numbers do not change: what comes back is what went.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

SMALLEST = 2**16
"""Bytes; smaller tensors stay, as a transfer costs more time than it brings room."""
HOST = torch.device("cpu")


@dataclass(frozen=True)
class _Copy:
    """A tensor in main memory."""

    data: Tensor
    device: torch.device
    """Where it came from."""
    is_there: torch.cuda.Event | None
    """Marks the end of the transfer; None where it was waited for."""

    def back(self) -> Tensor:
        """Return the tensor on its device."""
        if self.is_there is not None:
            torch.cuda.current_stream(self.device).wait_event(self.is_there)
        return self.data.to(self.device, non_blocking=True)


class HostActivations(torch.autograd.graph.saved_tensors_hooks):
    """The context in which autograd keeps tensors in main memory.

    Args:
        weights: storages that stay where they are, by number: keeping a weight costs nothing.
        host: where the tensors go.
        smallest: bytes from which on a tensor goes.
        stream: that carries the copies on a GPU; None copies in the stream of the computation.
    """

    def __init__(self, weights: frozenset[int], host: torch.device, smallest: int, stream: torch.cuda.Stream | None) -> None:
        super().__init__(self._keep, _back)
        self._weights = weights
        self._host = host
        self._smallest = smallest
        self._stream = stream
        # A text context is kept by every block that reads it: one copy serves all while the original lives.
        self._copies: dict[tuple[Any, ...], tuple[Callable[[], object], _Copy]] = {}

    def _keep(self, tensor: Tensor) -> Tensor | _Copy:
        if tensor.nbytes < self._smallest or is_traceable_wrapper_subclass(tensor):
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata in self._weights:
            return tensor
        key = (storage._cdata, tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride())
        is_alive, copy = self._copies.get(key, (lambda: None, None))
        if copy is None or is_alive() is None:
            copy = self._copy(tensor)
            self._copies[key] = (weakref.ref(storage), copy)
        return copy

    def _copy(self, tensor: Tensor) -> _Copy:
        data = torch.empty_like(tensor, device=self._host, pin_memory=self._stream is not None)
        if self._stream is None:
            return _Copy(data.copy_(tensor), tensor.device, None)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            data.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)  # its memory is not given away before the copy is made
            is_there = torch.cuda.Event()
            is_there.record(self._stream)
        return _Copy(data, tensor.device, is_there)


def _back(kept: Tensor | _Copy) -> Tensor:
    return kept.back() if isinstance(kept, _Copy) else kept


def keep_on_host(
    module: nn.Module,
    others: Iterable[nn.Module] = (),
    *,
    device: torch.device = HOST,
    host: torch.device = HOST,
    smallest: int = SMALLEST,
) -> None:
    """Let a module's forward pass keep in main memory what the backward pass needs.

    Args:
        module: its `forward` is replaced; its weights stay where they are.
        others: modules whose weights take part in the forward pass too, such as a network of adapters.
        device: that computes; the weights need not be there yet.
        host: where the tensors go.
        smallest: bytes from which on a tensor goes.
    """
    forward = module.forward
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    modules = (module, *others)

    def forward_with_host(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Asked anew each time: memory formats and loaded states give weights other storages. It takes some milliseconds.
        weights = frozenset(weight.untyped_storage()._cdata for each in modules for weight in each.parameters())
        with HostActivations(weights, host, smallest, stream):
            return forward(*args, **kwargs)

    module.forward = forward_with_host
