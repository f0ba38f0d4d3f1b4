"""An optimizer's state kept in main memory: the device holds that of the parameters that are being stepped.

What comes back is what went, so numbers do not change. Copies are made in the stream of the computation, into pinned memory: the
host waits for none of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")
SMALLEST = 2**16
"""Bytes; smaller tensors stay on the device, as a transfer costs more time than it brings room."""


class HostStates:
    """Keeps the state of an optimizer in main memory between its steps.

    Args:
        optimizer: as `make_optimizer` gives it; `of` finds this object from it.
        host: where the state lies.
        smallest: bytes from which on a tensor goes there.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, host: torch.device = HOST, smallest: int = SMALLEST) -> None:
        self._optimizer = optimizer
        self._host = host
        self._smallest = smallest
        self._homes: dict[tuple[nn.Parameter, str], Tensor] = {}
        optimizer.host_states = self  # type: ignore[attr-defined]
        optimizer.register_state_dict_pre_hook(_wait_for_copies)

    @staticmethod
    def of(optimizer: Any) -> "HostStates | None":
        """Return what keeps the state of an optimizer in main memory; None where it lies on the device."""
        found: HostStates | None = getattr(optimizer, "host_states", None)
        return found

    @contextmanager
    def brought(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """While entered, the state of these parameters is on their device; it goes back with what a step made of it.

        It also goes back where the step fails, for want of memory for example: what is done then needs the room.
        """
        try:
            for parameter, key, home in self._large(parameters):
                self._optimizer.state[parameter][key] = home.to(parameter.device, non_blocking=True, copy=True)
            yield
        finally:
            for parameter, key, value in self._large(parameters):
                self._optimizer.state[parameter][key] = self._taken_home(parameter, key, value)

    def load(self, load_state_dict: Callable[[Mapping[str, Any]], object], saved: Mapping[str, Any]) -> None:
        """Load a state dict without bringing what is large in it to the device.

        Args:
            load_state_dict: of the optimizer, or of what wraps it.
            saved: what `state_dict` returned.

        Raises:
            ValueError, KeyError: the state belongs to another optimizer.
        """
        rest = {
            number: {key: value for key, value in values.items() if not self._is_large(value)}
            for number, values in saved["state"].items()
        }
        load_state_dict({**saved, "state": rest})
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for key, value in saved["state"].get(number, {}).items():
                if self._is_large(value):
                    self._optimizer.state[parameter][key] = self._taken_home(parameter, key, value)

    def _large(self, parameters: Sequence[nn.Parameter]) -> list[tuple[nn.Parameter, str, Tensor]]:
        states = [(parameter, self._optimizer.state.get(parameter, {})) for parameter in parameters]
        return [(parameter, key, value) for parameter, state in states for key, value in state.items() if self._is_large(value)]

    def _is_large(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.nbytes >= self._smallest

    def _taken_home(self, parameter: nn.Parameter, key: str, value: Tensor) -> Tensor:
        """Copy a tensor of the state to its place in main memory, which it gets with its first step or when it is loaded."""
        home = self._homes.get((parameter, key))
        if home is None or home.shape != value.shape or home.dtype != value.dtype:
            home = torch.empty_like(value, device=self._host, pin_memory=parameter.device.type == "cuda")
            self._homes[parameter, key] = home
        return home.copy_(value, non_blocking=True)


def _wait_for_copies(optimizer: torch.optim.Optimizer) -> None:
    """Let what is on its way to main memory arrive before somebody reads it there."""
    if any(parameter.device.type == "cuda" for group in optimizer.param_groups for parameter in group["params"]):
        torch.cuda.synchronize()
