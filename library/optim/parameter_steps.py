"""Step a part of an optimizer's parameters, and bfloat16 ones without losing small steps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from library.optim.host_states import HostStates
from library.optim.stochastic_rounding import round_stochastically


class ParameterSteps:
    """Steps the parameters it is given and no others; the optimizer, its groups and its state stay one object.

    A bfloat16 parameter, and those of its optimizer state that have its shape, take their step in float32 and are rounded back
    stochastically. State of another shape, such as Adafactor's factors, and counts of steps stay in float32, 8-bit state in 8 bits.

    Args:
        optimizer: as `make_optimizer` gives it. Stepping parameters one after the other equals one step of all only where nothing
            is computed over several of them, see `library.options.checks_optimizer.steps_alone`. Where `HostStates` keeps its
            state in main memory, that of the parameters comes to their device meanwhile.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._host_states = HostStates.of(optimizer)
        everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._numbers = {parameter: number for number, parameter in enumerate(everything)}
        groups = enumerate(optimizer.param_groups)
        self._group_of = {parameter: number for number, group in groups for parameter in group["params"]}
        self._generators: dict[torch.device, torch.Generator] = {}

    def step(self, parameters: Sequence[nn.Parameter], seed: int) -> None:
        """Step these parameters with the gradients they have; those without one are left alone.

        Args:
            parameters: of the optimizer.
            seed: of the rounding; a parameter's draws depend on it and on the parameter's place in the optimizer alone.
        """
        halves = [p for p in parameters if p.dtype == torch.bfloat16 and p.grad is not None]
        brought = nullcontext() if self._host_states is None else self._host_states.brought(parameters)
        with brought, self._narrowed_to(parameters), self._in_float32(halves, seed):
            self._optimizer.step()

    @contextmanager
    def _narrowed_to(self, chosen: Sequence[nn.Parameter]) -> Iterator[None]:
        """Leave only these parameters in the groups; the groups stay the same objects, for some optimizers count steps in them.

        Only the groups of these are looked at: inside the backward pass this is done for each of some thousand parameters.
        """
        everything, numbers = self._optimizer.param_groups, [self._group_of[parameter] for parameter in chosen]
        concerned = {number: everything[number] for number in numbers}
        whole = [group["params"] for group in concerned.values()]
        for number, group in concerned.items():
            group["params"] = [parameter for parameter, own in zip(chosen, numbers, strict=True) if own == number]
        self._optimizer.param_groups = list(concerned.values())
        try:
            yield
        finally:
            self._optimizer.param_groups = everything
            for group, params in zip(concerned.values(), whole, strict=True):
                group["params"] = params

    @contextmanager
    def _in_float32(self, parameters: Sequence[nn.Parameter], seed: int) -> Iterator[None]:
        halves = [parameter.data for parameter in parameters]
        for parameter in parameters:
            _set_data(parameter, parameter.data.float())
            for key, value in self._large_state(parameter, torch.bfloat16):
                self._optimizer.state[parameter][key] = value.float()
        yield
        for parameter, half in zip(parameters, halves, strict=True):
            generator = self._generator(parameter, seed)
            _set_data(parameter, half.copy_(round_stochastically(parameter.data, generator)))
            for key, value in self._large_state(parameter, torch.float32):
                self._optimizer.state[parameter][key] = round_stochastically(value, generator)

    def _large_state(self, parameter: nn.Parameter, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
        state: Mapping[str, Any] = self._optimizer.state.get(parameter, {})
        return [
            (key, value)
            for key, value in state.items()
            if isinstance(value, Tensor) and value.dtype == dtype and value.shape == parameter.shape and key != "step"
        ]

    def _generator(self, parameter: nn.Parameter, seed: int) -> torch.Generator:
        generator = self._generators.setdefault(parameter.device, torch.Generator(parameter.device))
        return generator.manual_seed((seed ^ (self._numbers[parameter] * 0x9E3779B97F4A7C15)) & (2**63 - 1))


def _set_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Replace a parameter's values, and bring its gradient to their type."""
    gradient = parameter.grad
    parameter.grad = None
    parameter.data = data
    if gradient is not None:
        parameter.grad = gradient.to(data.dtype)


def load_optimizer_state(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Restore an optimizer's state with every tensor in the type it was saved in.

    `torch.optim.Optimizer.load_state_dict` casts state to the type of the parameter, which would round what is kept in float32
    beside bfloat16 weights.

    A state in which a schedule-free optimizer was in evaluation mode, as sd-scripts saves it, belongs to averaged weights: it is
    switched back to training mode, and the parameters with it.

    Args:
        optimizer: as `make_optimizer` gives it, or wrapped by accelerate; its parameters are those of the state.
        saved: what its `state_dict` returned.

    Raises:
        ValueError, KeyError: the state belongs to another optimizer.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if (host_states := HostStates.of(inner)) is not None:
        host_states.load(optimizer.load_state_dict, saved)
    else:
        optimizer.load_state_dict(saved)
    if getattr(optimizer, "restores_exactly", False):
        return
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        state = inner.state.get(parameter, {})
        for key, value in saved["state"].get(number, {}).items():
            if key in state:
                state[key] = _in_saved_type(value, state[key])
    if callable(to_train := getattr(inner, "train", None)):
        to_train()


def move_state(optimizer: Any, device: torch.device) -> None:
    """Put an optimizer's state on a device; counts, which have no axes, stay where the optimizer has them."""
    for state in optimizer.state.values():
        state.update({key: value.to(device) for key, value in state.items() if isinstance(value, Tensor) and value.ndim})


def _in_saved_type(saved: Any, loaded: Any) -> Any:
    """Return what was loaded, with every tensor in it, also within lists, in the type it was saved in."""
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(saved, list | tuple) and isinstance(loaded, list | tuple):
        return type(saved)(_in_saved_type(one, other) for one, other in zip(saved, loaded, strict=True))
    return loaded
