"""Keeps an update whose loss or gradient is not finite from the weights, without the host waiting for the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.optim.gradient_norms import total_norm


class FiniteGate:
    """Decides on the device whether an update is made.

    On the CPU the answer is there at once, and a step that would spoil the weights is not made at all. Elsewhere nobody waits for
    it: torch's fused kernels look at it themselves and leave weights and state as they are; other optimizers are given gradients of
    zero, so that nothing that is not finite reaches weights or state.

    Args:
        optimizer: that steps.
        stays_shut: whether no update is made any more after one that was not, so that the weights stay those before it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, stays_shut: bool) -> None:
        self._optimizer = optimizer
        self._stays_shut = stays_shut
        self._is_finite: Tensor | None = None

    def add(self, value: Tensor) -> None:
        """Take a loss or a norm () of the update under way, wherever it is."""
        own = torch.isfinite(value.detach())
        self._is_finite = own if self._is_finite is None else self._is_finite & own.to(self._is_finite.device)

    def admits(self, parameters: Sequence[nn.Parameter], norm: Tensor | None = None) -> bool:
        """Say whether the optimizer may step these parameters with their gradients; those are zero where it should not.

        Args:
            parameters: that are stepped next.
            norm: of all their gradients together, where it is known.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if norm is None and gradients:
            norm = total_norm(gradients)
        if norm is not None:
            self.add(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if self._is_finite is None:
            return True
        if self._is_finite.device.type == "cpu":
            return bool(self._is_finite)
        spoiled = ~self._is_finite
        if self._kernels_look(gradients):
            self._optimizer.found_inf = spoiled.float()  # type: ignore[attr-defined]
            return True
        for gradient in gradients:
            own: Any = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            own.masked_fill_(spoiled, 0)
        return True

    def is_open(self) -> bool:
        """Say whether everything was finite so far; waits for the device."""
        return self._is_finite is None or bool(self._is_finite)

    def take(self) -> Tensor:
        """Return whether the update was finite, (1,) on its device, and begin the next one."""
        taken = torch.ones(1, dtype=torch.bool) if self._is_finite is None else self._is_finite.reshape(1)
        if not self._stays_shut:
            self._is_finite = None
        return taken

    def _kernels_look(self, gradients: Sequence[Tensor]) -> bool:
        return (
            isinstance(self._optimizer, torch.optim.Adam | torch.optim.SGD)
            and all(group["fused"] for group in self._optimizer.param_groups)
            and not any(hasattr(gradient, "to_local") for gradient in gradients)
        )
