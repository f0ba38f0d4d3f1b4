"""Whole tensors of live modules and optimizers: the one place that knows how what is trained lies in memory.

Where it is divided over processes, whole tensors exist only within `gathered`, which all processes enter together: the process that
saves then reads them as often as it has to, without the others.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_gathered: dict[int, Tensor] = {}
"""Whole tensors in main memory by the identity of those that are divided; filled within `gathered` alone."""


@contextmanager
def gathered(module: nn.Module, optimizer: Any | None, *, keep: bool) -> Iterator[None]:
    """While entered, a module and an optimizer that are divided over processes can be read whole; every process enters.

    Args:
        module: whose state dict is gathered, tensor by tensor.
        optimizer: whose state is gathered too; None for none.
        keep: whether this process is the one that reads.
    """
    gathers_itself = hasattr(optimizer, "gather")
    states = [] if optimizer is None or gathers_itself else list(optimizer.state_dict()["state"].values())
    tensors = [*module.state_dict(keep_vars=True).values(), *(value for state in states for value in state.values())]
    try:
        if optimizer is not None and gathers_itself:
            optimizer.gather()
        for tensor in tensors:
            if isinstance(tensor, DTensor):
                whole = tensor.full_tensor().detach()
                if keep:
                    _gathered[id(tensor)] = whole.cpu()
        yield
    finally:
        _gathered.clear()
        if optimizer is not None and gathers_itself:
            optimizer.forget()


def full_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and whole tensor of everything in a module's state dict, in its order, on the device it is on.

    Everything that is saved of a live module is read here.
    """
    for name, tensor in module.state_dict(keep_vars=True).items():
        yield name, _whole(tensor).detach()


def full_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's state dict with whole tensors: that of the same run in one process."""
    saved: dict[str, Any] = optimizer.state_dict()
    whole = {
        number: {key: _whole(value) if isinstance(value, Tensor) else value for key, value in state.items()}
        for number, state in saved["state"].items()
    }
    return {**saved, "state": whole}


def shares_of_module(tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Return whole tensors divided as those of the same names in a module are."""
    own = module.state_dict()
    return {name: _share(tensor, own[name]) for name, tensor in tensors.items()}


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


def _whole(tensor: Tensor) -> Tensor:
    return _gathered[id(tensor)] if isinstance(tensor, DTensor) else tensor


def _share(tensor: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
