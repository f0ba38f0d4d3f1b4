"""Blocks of a model that lie in main memory and come to the device in turn, each in time for its part of a pass.

A few places on the device are made once. A block is brought to one of them while those before it compute; its parameters then point
there, and back to main memory when it leaves. Frozen blocks are only brought; trained ones are taken back after the backward pass
has changed them. See docs/block_swap.md.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from library.memory.transfers import ALIGNMENT, Arena, Mark, Transfers, transfers_of

FROZEN_PLACES = 2
"""One block computes and the next one comes."""
TRAINED_PLACES = 3
"""One block computes, one comes and one leaves."""


class Pass(Enum):
    """What a block is wanted for."""

    LOOK = "forward, without a backward pass"
    FORWARD = "forward, with a backward pass to come"
    BACKWARD = "backward"


class SwappedBlock:
    """A block with its large tensors in main memory, one behind the other, and the small ones on the device.

    Args:
        module: on any device; its tensors are moved.
        arena: main memory.
        device: that computes.
    """

    def __init__(self, module: nn.Module, arena: Arena, device: torch.device) -> None:
        self.module = module
        self.tensors = large_tensors(module)
        self._offsets = [0]
        for tensor in self.tensors:
            self._offsets.append(self._offsets[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
        self.home = arena.take(self.size)
        self._at_home = self.views_of(self.home)
        for view, tensor in zip(self._at_home, self.tensors, strict=True):
            view.copy_(tensor.detach())
        self.point_at(self._at_home)
        is_moved = {id(tensor) for tensor in self.tensors}
        for small in (part for parameter in module.parameters() for part in parts_of(parameter) if id(part) not in is_moved):
            small.data = small.data.to(device)
        self.taken_back: Mark = None
        """The end of the last copy to main memory."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self._offsets[-1]

    def views_of(self, buffer: Tensor) -> list[Tensor]:
        """Return the block's tensors as they lie in a buffer of bytes."""
        pieces = (buffer[start : start + tensor.nbytes] for start, tensor in zip(self._offsets, self.tensors, strict=False))
        return [
            piece.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
            for piece, tensor in zip(pieces, self.tensors, strict=True)
        ]

    def point_at(self, views: Sequence[Tensor]) -> None:
        """Let the parameters have their values somewhere else; they stay the same objects."""
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view

    def point_home(self) -> None:
        """Let the parameters have their values in main memory."""
        self.point_at(self._at_home)


@dataclass
class Place:
    """Room for one block on the device."""

    buffer: Tensor
    """Bytes."""
    block: int | None = None
    """Which one is there, or on its way."""
    is_pointed_at: bool = False
    """Whether the parameters have their values here."""
    is_changed: bool = False
    """Whether it may differ from what is in main memory."""
    arrived: Mark = None
    """The end of the block's copy."""
    views: dict[int, list[Tensor]] = field(default_factory=dict)
    """Of each block that was here, made once."""


@dataclass(frozen=True)
class _Weight:
    """A view of a block's weights that the backward pass wants: found again wherever the block is by then."""

    block: int
    offset: int
    """Bytes from the beginning of the block."""
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


class BlockSwap:
    """Brings blocks to the device when they are wanted, and the next ones meanwhile.

    Args:
        blocks: in the order of the forward pass.
        places: how many are on the device at a time.
        device: that computes.
    """

    def __init__(self, blocks: Sequence[SwappedBlock], places: int, device: torch.device) -> None:
        self._blocks = list(blocks)
        self._transfers: Transfers = transfers_of(device)
        largest = max(block.size for block in blocks)
        self._places = [Place(torch.empty(largest, dtype=torch.uint8, device=device)) for _ in range(places)]
        self._place_at = {place.buffer.untyped_storage()._cdata: place for place in self._places}
        self._keeping: list[saved_tensors_hooks] = []
        self._last: tuple[int, Pass] | None = None

    @property
    def in_main_memory(self) -> list[Tensor]:
        """The buffers of bytes there."""
        return [block.home for block in self._blocks]

    @property
    def places(self) -> list[Tensor]:
        """The buffers of bytes on the device."""
        return [place.buffer for place in self._places]

    @property
    def on_device(self) -> list[int]:
        """The numbers of the blocks that are there or on their way."""
        return [place.block for place in self._places if place.block is not None]

    def attach(self) -> None:
        """Have the blocks brought whenever they are called, or wanted in the backward pass."""
        for number, block in enumerate(self._blocks):
            block.module.register_forward_pre_hook(self._before(number))
            block.module.register_forward_hook(self._after, always_call=True)
            for tensor in block.tensors:
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient_arrives(number))
            block.module._apply = _unmoved(block.module)  # type: ignore[method-assign]

    def enter(self, number: int, what_for: Pass) -> None:
        """Have a block on the device, and those that are wanted after it on their way.

        Args:
            number: of the block.
            what_for: decides which ones come next.
        """
        if self._last == (number, what_for):
            return
        self._last = (number, what_for)
        wanted = upcoming(number, what_for, len(self._blocks), len(self._places))
        place = self._bring(number, wanted)
        if not place.is_pointed_at:
            self._transfers.compute_after(place.arrived)
            self._blocks[number].point_at(place.views[number])
            place.is_pointed_at = True
        for later in wanted[1:]:
            self._bring(later, wanted)

    def settle(self) -> None:
        """Wait until main memory and the places hold what the parameters point to, for whoever reads these next."""
        for block in self._blocks:
            self._transfers.wait(block.taken_back)

    def bring_home(self) -> None:
        """Have all blocks in main memory and nowhere else, for whoever writes to the parameters next."""
        for place in self._places:
            self._vacate(place)
        self.settle()
        self._last = None

    def _bring(self, number: int, wanted: Sequence[int]) -> Place:
        """Return the block's place, with the block there or on its way."""
        for place in self._places:
            if place.block == number:
                return place
        place = next(place for place in self._places if place.block not in wanted)
        is_free = self._vacate(place)
        block = self._blocks[number]
        if number not in place.views:
            place.views[number] = block.views_of(place.buffer)
        place.block = number
        # A block that has just left is home: what took its place came on the same lane, and waited for it.
        place.arrived = self._transfers.bring(place.buffer[: block.size], block.home, is_free)
        return place

    def _vacate(self, place: Place) -> Mark:
        """Take the block in a place back to main memory, and return when the place is free."""
        is_free = self._transfers.mark()
        if place.block is None:
            return is_free
        block = self._blocks[place.block]
        if place.is_changed:
            is_free = block.taken_back = self._transfers.take_away(block.home, place.buffer[: block.size], is_free)
        if place.is_pointed_at:
            block.point_home()
        place.block, place.is_changed, place.is_pointed_at = None, False, False
        return is_free

    def _before(self, number: int) -> Callable[..., None]:
        def before(module: nn.Module, args: Any) -> None:
            self.enter(number, current_pass())
            if torch.is_grad_enabled():
                hooks = saved_tensors_hooks(*self._keep_and_find())
                hooks.__enter__()
                self._keeping.append(hooks)

        return before

    def _gradient_arrives(self, number: int) -> Callable[[Tensor], None]:
        """Return what is called ahead of an update in the backward pass: it has to find the weights here, and changes them."""

        def gradient_arrives(gradient: Tensor) -> None:
            self.enter(number, Pass.BACKWARD)
            next(place for place in self._places if place.block == number).is_changed = True

        return gradient_arrives

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._keeping:
            self._keeping.pop().__exit__()

    def _keep_and_find(self) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
        """Return what autograd keeps instead of a tensor, and what it gets back: weights by their place in the block.

        Everything else goes the way it would have gone, such as to recomputation, or to main memory.
        """
        others = torch._C._autograd._top_saved_tensors_default_hooks(True)
        keep, find = others or (_plain, lambda kept: kept)

        def keep_but_weights(tensor: Tensor) -> Any:
            return self._weight(tensor) or keep(tensor)

        def find_weights_too(kept: Any) -> Tensor:
            found: Tensor = self._found(kept) if isinstance(kept, _Weight) else find(kept)
            return found

        return keep_but_weights, find_weights_too

    def _weight(self, tensor: Tensor) -> _Weight | None:
        if is_traceable_wrapper_subclass(tensor):  # what it is made of is swapped, so it is kept as the parameter that it is
            return None
        place = self._place_at.get(tensor.untyped_storage()._cdata)
        if place is None or place.block is None:
            return None
        offset = tensor.storage_offset() * tensor.element_size()
        return _Weight(place.block, int(offset), tensor.dtype, tensor.shape, tensor.stride())

    def _found(self, weight: _Weight) -> Tensor:
        self.enter(weight.block, Pass.BACKWARD)
        buffer = next(place.buffer for place in self._places if place.block == weight.block)
        return buffer[weight.offset :].view(weight.dtype).as_strided(weight.shape, weight.stride)


def upcoming(number: int, what_for: Pass, blocks: int, most: int) -> list[int]:
    """Return the blocks that are wanted from here on, the first first, at most `most`, each once.

    The backward pass goes through the blocks from the last to the first; the next forward pass begins where it ended.

    Args:
        number: of the block that is wanted now.
        what_for: the pass it is wanted for.
        blocks: how many there are.
        most: at most as many as there are.
    """
    onward, back = range(number, blocks), range(blocks - 1, -1, -1)
    match what_for:
        case Pass.LOOK:
            order = chain(onward, range(blocks))
        case Pass.FORWARD:
            order = chain(onward, back)
        case Pass.BACKWARD:
            order = chain(back[blocks - 1 - number :], range(blocks))
    return list(dict.fromkeys(order))[:most]


def current_pass() -> Pass:
    """Say what a forward pass is made for that runs now: also recomputation runs one."""
    if torch._C._current_graph_task_id() != -1:
        return Pass.BACKWARD
    return Pass.FORWARD if torch.is_grad_enabled() else Pass.LOOK


def large_tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors of a module that are worth moving: matrices and kernels, and what packed ones are made of."""
    return [
        tensor for parameter in module.parameters() if parameter.ndim > 1 for tensor in parts_of(parameter) if tensor.numel() > 1
    ]


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Return what a tensor is stored in: itself, or the tensors that it is packed in."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def _unmoved(module: nn.Module) -> Callable[..., nn.Module]:
    """Return what leaves a module's tensors where they are when `.to(device)` is called on the model: only swapping moves them."""
    return lambda fn, recurse=True: module


def _plain(tensor: Tensor) -> Tensor:
    """Return what autograd can keep without keeping itself alive: a result kept by the operation that made it is a cycle."""
    return tensor if tensor.grad_fn is None else tensor.detach()


_swaps: weakref.WeakKeyDictionary[nn.Module, BlockSwap] = weakref.WeakKeyDictionary()


def swap_blocks(model: nn.Module, blocks: Sequence[nn.Module], places: int, device: torch.device) -> BlockSwap:
    """Keep some blocks of a model in main memory and have them brought whenever they are wanted.

    The model's state dict can be read and loaded as before.

    Args:
        model: whose blocks they are; on any device, and on `device` afterwards but for the blocks.
        blocks: in the order of the forward pass; more than `places`.
        places: how many are on the device at a time.
        device: that computes.
    """
    arena = Arena(is_pinned=device.type == "cuda")
    swap = BlockSwap([SwappedBlock(block, arena, device) for block in blocks], places, device)
    swap.attach()
    if device.type != "cpu":
        model.to(device)
    model.register_state_dict_pre_hook(lambda *_: swap.settle())
    model.register_load_state_dict_pre_hook(lambda *_: swap.bring_home())
    _swaps[model] = swap
    return swap


def wait_for_swapping(module: nn.Module) -> None:
    """Wait until the parameters of swapped blocks are where they point to; for those who read them other than as a state dict."""
    for part in module.modules():
        if part in _swaps:
            _swaps[part].settle()


def kept_in_main_memory(model: nn.Module) -> list[Tensor]:
    """Return the buffers in main memory of a model whose blocks are swapped; none of another."""
    swap = _swaps.get(model)
    return [] if swap is None else swap.in_main_memory


def places_on_device(model: nn.Module) -> list[Tensor]:
    """Return the buffers on the device that a model's blocks take turns in, if they are swapped."""
    swap = _swaps.get(model)
    return [] if swap is None else swap.places
