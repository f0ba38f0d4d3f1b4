"""The state of optimizers whose steps cannot be traced, because they depend on values: counted after a real step of small tensors.

Each kind of parameter is stood for by one with fewer elements along its long axes. What the optimizer keeps of it is scaled up axis
by axis, or where the shapes have nothing in common, by the number of elements. What a step needs for itself is not counted.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from library.memory.trace import kind_of
from library.optim.optimizers import make_optimizer
from library.options.checks_optimizer import optimizer_name
from library.options.groups.optimizer import OptimizerOptions

_LONG = 16
"""Axes up to this length stay as they are."""
_LENGTHS = (127, 131, 137, 139)
"""Of long axes, by their number: told apart in what the optimizer keeps, and enough elements for state in blocks."""


def stepped_bytes(options: OptimizerOptions, parameters: Sequence[Tensor]) -> int:
    """Return the bytes that an optimizer keeps of some parameters, of any size and without values.

    Args:
        options: of the optimizer.
        parameters: that it steps.

    Raises:
        Exception: whatever the optimizer raises.
    """
    kinds = {kind_of(parameter): parameter for parameter in parameters}
    counts = Counter(map(kind_of, parameters))
    with unset_fake_temporarily(), torch.enable_grad(), torch.random.fork_rng([]):
        small = {kind: _small(tuple(parameter.shape), parameter.dtype) for kind, parameter in kinds.items()}
        optimizer = make_optimizer(options, [{"params": list(small.values()), "lr": options.learning_rate}])
        optimizer.step()
        tensors = {kind: _tensors(list(optimizer.state[parameter].values())) for kind, parameter in small.items()}
        places = Counter(tensor.data_ptr() for each in tensors.values() for tensor in each)
    own = {
        kind: [tensor for tensor in each if places[tensor.data_ptr()] == 1] for kind, each in tensors.items()
    }  # no shared tables
    return sum(counts[kind] * _kept(own[kind], tuple(kinds[kind].shape), tuple(small[kind].shape)) for kind in kinds)


def no_step(options: OptimizerOptions) -> str | None:
    """Say in a sentence why the state of an optimizer cannot be counted; None where it can."""
    try:
        stepped_bytes(options, [torch.empty(_LONG, _LONG, device="meta")])
    except Exception as error:  # a class may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return (
            f"The memory of {optimizer_name(options)} cannot be forecast: its step depends on values, and one with small tensors "
            f"failed ({reason}). Measure it, or forecast another --optimizer_type, such as AdamW, AdamW8bit or Adafactor."
        )
    return None


def _small(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    size = [length if length <= _LONG else _LENGTHS[axis % len(_LENGTHS)] for axis, length in enumerate(shape)]
    parameter = nn.Parameter(torch.linspace(-1, 1, torch.Size(size).numel()).reshape(size).to(dtype))
    parameter.grad = parameter.detach().flip(0) * 0.1 if size else torch.ones_like(parameter)
    return parameter


def _kept(state: Sequence[Tensor], shape: tuple[int, ...], small: tuple[int, ...]) -> int:
    """Return the bytes that the state of a small parameter would have for one of another shape."""
    elements = torch.Size(shape).numel() / max(torch.Size(small).numel(), 1)
    lengths = {short: length for short, length in zip(small, shape, strict=True) if short in _LENGTHS}
    size = 0.0
    for value in state:
        if value.numel() <= 1:
            continue
        if all(each in lengths or each <= _LONG for each in value.shape):
            size += value.element_size() * torch.Size([lengths.get(each, each) for each in value.shape]).numel()
        else:
            size += value.nbytes * elements
    return int(size)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
