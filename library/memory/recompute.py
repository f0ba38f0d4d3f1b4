"""What each block of a model keeps for the backward pass, and how many of them have to be computed again for a step to fit."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def kept_by_blocks(blocks: Mapping[str, nn.Module], run: Callable[[], object], weights: Iterable[Tensor]) -> dict[str, int]:
    """Return the bytes that each block keeps besides its inputs, which somebody keeps anyway.

    Args:
        blocks: by name, none of them checkpointed.
        run: a forward pass with gradients, with real tensors or under `FakeTensorMode`.
        weights: cost nothing to keep: of the model and of what is attached to it.
    """
    known = {_storage(weight) for weight in weights}
    kept: dict[str, int] = {}
    alive: list[Tensor] = []  # so that no storage gets the number of one that is gone
    with ExitStack() as stack:
        for name, block in blocks.items():
            counter = _Counter(name, known, kept, alive)
            stack.callback(block.register_forward_pre_hook(counter.begin).remove)
            stack.callback(block.register_forward_hook(counter.end).remove)
        run()
    return kept


def fraction_to_save(kept: Sequence[int], wanted: int) -> float | None:
    """Return the smallest `--checkpoint_fraction` that saves so much at the peak, or None where all blocks do not keep that.

    Args:
        kept: bytes of each block, in the order in which they are computed again.
        wanted: bytes.
    """
    saved = 0
    for number, size in enumerate(kept, start=1):
        saved += size
        if saved >= wanted:
            return round(number / len(kept), 3)
    return None


class _Counter:
    """Counts what is kept between the beginning of a block and its end."""

    def __init__(self, name: str, known: set[int], kept: dict[str, int], alive: list[Tensor]) -> None:
        self._name = name
        self._known = known
        self._kept = kept
        self._alive = alive
        self._hooks: saved_tensors_hooks | None = None

    def begin(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Know the inputs, and see what is kept from here on."""
        self._kept.setdefault(self._name, 0)
        for value in inputs:
            self._known.add(_storage(value))
            self._alive.append(value)
        self._hooks = saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()

    def end(self, block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """See no more."""
        if self._hooks is not None:
            self._hooks.__exit__()

    def _keep(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._known:
            self._known.add(_storage(tensor))
            self._alive.append(tensor)
            self._kept[self._name] += tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number
