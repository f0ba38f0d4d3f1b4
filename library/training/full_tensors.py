"""Whole tensors of live modules: the one place that knows how what is trained lies in memory."""

from collections.abc import Iterator

from torch import Tensor, nn


def full_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and whole tensor of everything in a module's state dict, in its order, on the device it is on.

    Everything that is saved of a live module is read here. Every process of a run calls this at the same place.
    """
    yield from module.state_dict().items()
