"""An optimizer that DeepSpeed divides over processes, as states see it: with whole parameters, wherever their elements lie."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.training.full_tensors import full_shape


@dataclass(frozen=True)
class Place:
    """Where the elements of a parameter are that this process steps; all of it may be empty."""

    share: Tensor
    """Flat; has elements of many parameters."""
    start: int
    """Of the elements in the share."""
    parameter_start: int
    """Of the elements in the parameter."""
    count: int

    def own(self, state: Tensor) -> Tensor:
        """Return the elements in the share, or in state of the optimizer that lies as the share does."""
        return state.narrow(0, self.start, self.count)

    def fragment(self, whole: Tensor) -> Tensor:
        """Return the same elements, flat, of a tensor like the whole parameter."""
        return whole.view(-1).narrow(0, self.parameter_start, self.count)


class GroupShares:
    """Stages 1 and 2: a process steps one stretch of all parameters of a group, laid end to end."""

    def place(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> Place:
        """Find a parameter, given its group."""
        share = group["params"][0]
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return Place(share, 0, 0, 0)
        stepped, own = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        return Place(share, stepped.start, own.start, stepped.numel)


class DividedShares:
    """Stage 3: a process steps its part of each parameter; parts are of one size, the last one filled up.

    Args:
        inner: DeepSpeed's optimizer.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def place(self, parameter: Any, group: Mapping[str, Any]) -> Place:
        """Find a parameter, given its group."""
        number, start, size = self._inner.grad_position[self._inner.get_param_id(parameter)]
        before = size * torch.distributed.get_rank()
        count = max(0, min(size, parameter.ds_numel - before))
        return Place(self._inner.fp32_partitioned_groups_flat[number], start, before if count else 0, count)


class ZeroOptimizer:
    """The optimizer as states see it: with the parameters it was made over, not the shares it steps.

    Args:
        optimizer: whose groups DeepSpeed has given shares of their parameters.
        inner: DeepSpeed's own around it.
        parameters: of each group, whole.
        shares: finds parameters in the shares.
    """

    restores_exactly = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        inner: Any,
        parameters: Sequence[Sequence[nn.Parameter]],
        shares: GroupShares | DividedShares,
    ) -> None:
        self.optimizer = optimizer
        self._inner = inner
        self._parameters = parameters
        self._shares = shares

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups as they are now, with whole parameters."""
        groups = zip(self.optimizer.param_groups, self._parameters, strict=True)
        return [{**group, "params": list(parameters)} for group, parameters in groups]

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of a group that says nothing else."""
        return self.optimizer.defaults

    def whole_state(self, *, keep: bool) -> dict[str, Any] | None:
        """Return the state dict that the same optimizer in one process would have, in main memory; every process calls it.

        Args:
            keep: whether this process wants it; None is returned elsewhere.
        """
        states: dict[int, dict[str, Any]] = {}
        for number, parameter, place in self._numbered():
            state = {key: _whole(parameter, place, value) for key, value in self.optimizer.state.get(place.share, {}).items()}
            if keep:
                states[number] = state
        numbers = iter(range(sum(map(len, self._parameters))))
        groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in self.param_groups]
        return {"state": states, "param_groups": groups} if keep else None

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take up the state of a run in any number of processes, and the parameters as they are now."""
        for group, told in zip(self.optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in told.items() if key != "params"})
        for number, parameter, place in self._numbered():
            state = self.optimizer.state[place.share]
            for key, value in saved["state"].get(number, {}).items():
                if getattr(value, "shape", None) != full_shape(parameter):
                    state[key] = value.clone() if isinstance(value, Tensor) else value
                    continue
                state.setdefault(key, torch.zeros_like(place.share, dtype=value.dtype))
                place.own(state[key]).copy_(place.fragment(value))
        self._inner.refresh_fp32_params()

    def _numbered(self) -> Iterator[tuple[int, nn.Parameter, Place]]:
        """Yield number and parameter of each that is trained, and where it is in what this process steps."""
        number = 0
        for group, parameters in zip(self.optimizer.param_groups, self._parameters, strict=True):
            for parameter in parameters:
                if parameter.requires_grad:
                    yield number, parameter, self._shares.place(parameter, group)
                number += 1


def _whole(parameter: nn.Parameter, place: Place, value: Any) -> Any:
    """Return state of the optimizer for a whole parameter, in main memory; every process calls it."""
    if not isinstance(value, Tensor) or value.shape != place.share.shape:
        return value.detach().cpu() if isinstance(value, Tensor) else value
    whole = torch.zeros(full_shape(parameter), dtype=value.dtype, device=parameter.device)
    place.fragment(whole).copy_(place.own(value))
    torch.distributed.all_reduce(whole)  # everybody has another part of it, and zeros elsewhere
    return whole.detach().cpu()
