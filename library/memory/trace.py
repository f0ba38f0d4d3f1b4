"""The peak memory of a piece of work, counted storage by storage; under fake tensors it needs no memory itself.

Torch's own MemTracker stops at frozen parameters. This mode sees every operation below autograd, counts each new storage once, and
learns from the garbage collector when it is gone, which is when torch's allocators take it back.
"""

import copy
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from library.memory.block_swap import kept_in_main_memory, places_on_device

WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS = "weights", "gradients", "optimizer", "activations"
_DEVICE_OF = torch.ops.prim.device.default
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
        self._total = 0
        self._known: dict[Hashable, Mapping[str, int]] = {}
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
        if func is _DEVICE_OF and isinstance(args[0], FakeTensor):  # asked several times by each operation, and makes nothing
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf, None)
        return result

    def once(self, work: Callable[[], None], kind: Hashable) -> None:
        """Do work that leaves nothing more behind; where work of this kind was done before, only count what that needed at most."""
        more = self._known.get(kind)
        if more is not None:
            self._note_peak(more)
            return
        before, alive = self.peak, dict(self._alive)
        self.peak = Peak(0)
        self._note_peak({})
        work()
        if all(self._alive[part] <= size for part, size in alive.items()):
            self._known[kind] = {part: size - alive[part] for part, size in self.peak.parts.items()}
        self.peak = max(before, self.peak, key=lambda peak: peak.total)

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
            self._total += size
            weakref.finalize(storage, self._forget, number).atexit = False
            if self._total > self.peak.total:
                self.peak = Peak(self._total, dict(self._alive))
        elif category is not None and self._categories[number] != category:
            self._alive[self._categories[number]] -= self._sizes[number]
            self._categories[number] = category
            self._alive[category] += self._sizes[number]

    def _forget(self, number: int) -> None:
        size = self._sizes.pop(number)
        self._alive[self._categories.pop(number)] -= size
        self._total -= size

    def _note_peak(self, more: Mapping[str, int]) -> None:
        """Take in that so much more was there in each category for a moment."""
        total = self._total + sum(more.values())
        if total > self.peak.total:
            self.peak = Peak(total, {part: size + more.get(part, 0) for part, size in self._alive.items()})


def trace_peak(
    step: Callable[[], None],
    modules: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    kept: Iterable[Tensor] = (),
    counter: StorageCounter | None = None,
) -> Peak:
    """Return the peak of a training step when the optimizer's state exists, see `make_state`.

    Run it inside `FakeTensorMode`, in which everything was made, or with real tensors.

    Args:
        step: forward, backward and update.
        modules: whose parameters and buffers are the weights.
        optimizer: steps the trained ones among them.
        device: whose memory is counted.
        kept: further tensors that stay on the device, such as averaged weights; they count as weights.
        counter: of that device, where somebody has to know it before.
    """
    counter = counter or StorageCounter(device)
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


def kind_of(tensor: Tensor) -> Hashable:
    """Return what decides the bytes of a tensor and of what is computed from it."""
    return tensor.dtype, tuple(tensor.shape), tensor.stride()


class _OnesFor(torch.autograd.Function):
    """A result whose gradient is one for each element of some parameters: one node of the graph for all of them."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return tuple(torch.ones_like(parameter) for parameter in ctx.parameters)


def make_state(optimizer: torch.optim.Optimizer, finish: Callable[[], object]) -> None:
    """Have an optimizer make its state, without the cost of a training step.

    The first parameter of each kind is stepped; the state of the others is like its.

    Args:
        optimizer: whose trained parameters get gradients, so that what steps inside the backward pass does.
        finish: makes the update, and drops the gradients.
    """
    kinds: dict[Hashable, list[nn.Parameter]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter.requires_grad:
                kinds.setdefault((number, kind_of(parameter)), []).append(parameter)
    _OnesFor.apply(*(first for first, *_ in kinds.values())).backward()
    finish()
    for first, *others in kinds.values():
        for parameter in others:
            optimizer.state[parameter] = {
                name: value.clone() if isinstance(value, Tensor) else copy.copy(value)
                for name, value in optimizer.state[first].items()
            }
