"""How large gradients are, part by part, measured without waiting for the device."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class GradientNorms:
    """The Euclidean norm of each group's gradient, as it is before anything limits it.

    Args:
        groups: the optimizer's parameter groups.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._group_of = {id(parameter): number for number, group in enumerate(groups) for parameter in group["params"]}
        self._squares: list[Tensor | None] = [None] * len(groups)

    def add(self, parameters: Sequence[nn.Parameter], scale: Tensor | None = None) -> None:
        """Take the gradients of some parameters, each once in an update.

        Args:
            parameters: those without a gradient count nothing.
            scale: what float16 gradients are multiplied by, where they still are.
        """
        gradients: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                gradients.setdefault(self._group_of[id(parameter)], []).append(parameter.grad)
        for number, own in gradients.items():
            norm = total_norm(own)
            square = (norm if scale is None else norm / scale.to(norm.device)).square()
            before = self._squares[number]
            self._squares[number] = square if before is None else before + square

    def take(self) -> list[Tensor | float]:
        """Return the norm of each group's gradient and forget it; 0 where a group had none."""
        taken, self._squares = self._squares, [None] * len(self._squares)
        return [0.0 if square is None else square.sqrt() for square in taken]


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm () of gradients together, float32; at least one."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients), 2, torch.float32)))
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of gradients that are spread over processes
    return whole
