"""The peak memory of a piece of work, counted storage by storage; under fake tensors it needs no memory itself.

Torch's own MemTracker stops at frozen parameters. This mode sees every operation below autograd, counts each new storage once, and
learns from the garbage collector when it is gone, which is when torch's allocators take it back.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from library.memory.block_swap import kept_in_main_memory, places_on_device

WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS = "weights", "gradients", "optimizer", "activations"
_BLOCK = 512
"""Bytes that torch's CUDA allocator rounds every storage up to."""


@dataclass(frozen=True)
class Peak:
    """What was resident when most was."""

    total: int
    """Bytes."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """Bytes by category: weights, gradients, optimizer, and activations with all other temporary results."""

    def in_gib(self) -> dict[str, float]:
        """Return the parts and the total in GiB, rounded to the MiB."""
        return {name: round(size / 2**30, 3) for name, size in {**self.parts, "total": self.total}.items()}


def with_more(peak: Peak, category: str, size: int) -> Peak:
    """Add bytes that were not traced to a category of a peak."""
    return Peak(peak.total + size, {**peak.parts, category: peak.parts[category] + size})


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of living storages of one device by category.

    Args:
        device: storages elsewhere do not count.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device_type = device.type
        self._categories: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._alive: dict[str, int] = dict.fromkeys((WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS), 0)
        self._elsewhere: set[int] = set()
        self.peak = Peak(0)

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Take the storages of tensors as lying in main memory, whatever device they pretend to be on; they stay alive."""
        self._elsewhere.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def register(self, tensors: Iterable[Any], category: str) -> None:
        """Count the storages of tensors in a category, whether they were counted before or not; other values are skipped."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._count(tensor, category)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf, None)
        return result

    def _count(self, tensor: Tensor, category: str | None) -> None:
        if tensor.device.type != self._device_type:
            return
        if is_traceable_wrapper_subclass(tensor):  # has no storage of its own
            for name in tensor.__tensor_flatten__()[0]:
                self._count(getattr(tensor, name), category)
            return
        storage = tensor.untyped_storage()
        number = storage._cdata
        if number in self._elsewhere:
            return
        if number not in self._sizes:
            size = -(-storage.nbytes() // _BLOCK) * _BLOCK
            self._sizes[number] = size
            self._categories[number] = category or ACTIVATIONS
            self._alive[self._categories[number]] += size
            weakref.finalize(storage, self._forget, number).atexit = False
            self._note_peak()
        elif category is not None and self._categories[number] != category:
            self._alive[self._categories[number]] -= self._sizes[number]
            self._categories[number] = category
            self._alive[category] += self._sizes[number]

    def _forget(self, number: int) -> None:
        self._alive[self._categories.pop(number)] -= self._sizes.pop(number)

    def _note_peak(self) -> None:
        total = sum(self._alive.values())
        if total > self.peak.total:
            self.peak = Peak(total, dict(self._alive))


def trace_peak(
    step: Callable[[], None],
    modules: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    kept: Iterable[Tensor] = (),
) -> Peak:
    """Return the peak of a training step when the optimizer's state exists, see `make_state`.

    Run it inside `FakeTensorMode`, in which everything was made, or with real tensors.

    Args:
        step: forward, backward and update.
        modules: whose parameters and buffers are the weights.
        optimizer: steps the trained ones among them.
        device: whose memory is counted.
        kept: further tensors that stay on the device, such as averaged weights; they count as weights.
    """
    counter = StorageCounter(device)
    register_resident(counter, modules, optimizer, kept)
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]

    def gradient_arrives(gradient: Tensor) -> None:
        counter.register([gradient], GRADIENTS)

    # Before it is accumulated: what steps inside the backward pass drops it in a later hook, ahead of ours.
    hooks = [parameter.register_hook(gradient_arrives) for parameter in parameters]
    try:
        with counter:
            step()
    finally:
        for hook in hooks:
            hook.remove()
    return counter.peak


def register_resident(
    counter: StorageCounter, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer, kept: Iterable[Tensor] = ()
) -> None:
    """Count what stays from step to step; see `trace_peak`.

    Gradients that are there already count too: where an update has several batches, those of the first ones are.
    """
    counter.leave_out(buffer for module in modules for buffer in kept_in_main_memory(module))
    parameters = [parameter for module in modules for parameter in module.parameters()]
    counter.register((place for module in modules for place in places_on_device(module)), WEIGHTS)
    counter.register([*parameters, *(buffer for module in modules for buffer in module.buffers()), *kept], WEIGHTS)
    counter.register([value for state in optimizer.state.values() for value in state.values()], OPTIMIZER)
    counter.register([parameter.grad for parameter in parameters if parameter.grad is not None], GRADIENTS)


def make_state(parameters: Sequence[nn.Parameter], finish: Callable[[], object]) -> None:
    """Have an optimizer make its state, without the cost of a training step.

    Args:
        parameters: that are trained; each gets a gradient, so that what steps inside the backward pass does.
        finish: makes the update, and drops the gradients.
    """
    torch.stack([parameter.float().sum() for parameter in parameters]).sum().backward()
    finish()
