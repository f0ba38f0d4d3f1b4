"""Whole tensors of live modules and optimizers: the one place that knows how what is trained lies in memory.

Where it is divided over processes, whole tensors exist only in what `gather` returns, which all processes call together: the
process that saves then reads them as often as it has to, without the others.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Gathered:
    """The whole of what is divided over processes, in main memory for as long as this lives; empty where nothing is divided."""

    tensors: Mapping[int, Tensor] = field(default_factory=dict)
    """By the identity of the tensor they are the whole of."""
    optimizer_state: Mapping[str, Any] | None = None
    """Of an optimizer that gathers its state itself."""

    def whole(self, tensor: Tensor) -> Tensor:
        """Return the whole of a tensor, which is the tensor itself where it is not divided."""
        return self.tensors[id(tensor)] if _is_share(tensor) or _has_parts(tensor) else tensor


def gather(module: nn.Module, optimizer: Any | None, *, keep: bool) -> Gathered:
    """Gather a module and an optimizer that are divided over processes; every process calls it.

    Args:
        module: whose state dict is gathered, tensor by tensor.
        optimizer: whose state is gathered too; None for none.
        keep: whether this process is the one that reads; the others keep nothing.
    """
    gathers_itself = hasattr(optimizer, "whole_state")
    states = [] if optimizer is None or gathers_itself else list(optimizer.state_dict()["state"].values())
    tensors = [*module.state_dict(keep_vars=True).values(), *(value for state in states for value in state.values())]
    wholes = {id(tensor): whole for tensor in tensors if (whole := _gathered(tensor, keep=keep)) is not None}
    return Gathered(wholes, optimizer.whole_state(keep=keep) if optimizer is not None and gathers_itself else None)


def _gathered(tensor: Any, *, keep: bool) -> Tensor | None:
    """Return the whole of a divided tensor in main memory; None where it is not divided, and in processes that do not keep it."""
    if _is_share(tensor):
        whole: Tensor = tensor.full_tensor().detach()
        return whole.cpu() if keep else None
    if _has_parts(tensor):
        with _put_together(tensor):
            return tensor.detach().to("cpu", copy=True) if keep else None
    return None


def full_tensors(module: nn.Module, gathered: Gathered) -> Iterator[tuple[str, Tensor]]:
    """Yield name and whole tensor of everything in a module's state dict, in its order, on the device it is on.

    Everything that is saved of a live module is read here.
    """
    for name, tensor in module.state_dict(keep_vars=True).items():
        yield name, gathered.whole(tensor).detach()


def full_optimizer_state(optimizer: Any, gathered: Gathered) -> dict[str, Any]:
    """Return an optimizer's state dict with whole tensors: that of the same run in one process."""
    if gathered.optimizer_state is not None:
        return dict(gathered.optimizer_state)
    saved: dict[str, Any] = optimizer.state_dict()
    whole = {
        number: {key: gathered.whole(value) if isinstance(value, Tensor) else value for key, value in state.items()}
        for number, state in saved["state"].items()
    }
    return {**saved, "state": whole}


def full_shape(tensor: Any) -> torch.Size:
    """Return the shape of the whole of a tensor, which may be divided."""
    shape: torch.Size = tensor.ds_shape if _has_parts(tensor) else tensor.shape
    return shape


def full_size(tensor: Any) -> int:
    """Return the number of elements of the whole of a tensor, which may be divided."""
    return full_shape(tensor).numel()


def full_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shape of the whole of everything in a module's state dict."""
    return {name: full_shape(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}


def load_full_tensors(tensors: Mapping[str, Tensor], module: nn.Module) -> None:
    """Put whole tensors into a module, all of its state dict, divided as those there are; every process does it alike."""
    own = module.state_dict(keep_vars=True)
    parted = {name: tensor for name, tensor in own.items() if _has_parts(tensor)}
    with torch.no_grad():
        for name, tensor in parted.items():
            with _put_together(tensor, changed=True):
                tensor.copy_(tensors[name])
    others = {name: _share(tensor, own[name]) for name, tensor in tensors.items() if name not in parted}
    module.load_state_dict(others, strict=not parted)


def shares_of_optimizer_state(saved: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """Return a state dict of `full_optimizer_state` divided as the optimizer's parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    divided = {
        number: {
            key: _share(value, parameters[number]) if getattr(value, "shape", None) == parameters[number].shape else value
            for key, value in state.items()
        }
        for number, state in saved["state"].items()
    }
    return {**saved, "state": divided}


def _is_share(tensor: Any) -> bool:
    """Tell whether PyTorch divides the tensor (DTensor, whose import alone takes a second)."""
    return hasattr(tensor, "device_mesh")


def _has_parts(tensor: Any) -> bool:
    """Tell whether DeepSpeed keeps the tensor in parts (ZeRO stage 3)."""
    return hasattr(tensor, "ds_id")


def _put_together(tensor: Tensor, *, changed: bool = False) -> AbstractContextManager[None]:
    """While entered, a tensor that DeepSpeed divides is whole in every process; every process enters, and may change it alike."""
    import deepspeed

    together: AbstractContextManager[None] = deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if changed else None)
    return together


def _share(tensor: Tensor, like: Any) -> Tensor:
    if not _is_share(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
