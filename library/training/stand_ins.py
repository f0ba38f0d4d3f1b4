"""What stands for an optimizer while a step is traced under fake tensors, and what it keeps where that is computed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from library.memory.trace import StorageCounter, kind_of
from library.memory.traceable import ADAFACTOR, KEPT_BY_BITSANDBYTES, kept_bytes, untraceable
from library.optim.optimizers import choose_kernels
from library.optim.updates import UpdateInBackward, Updater
from library.options.checks_optimizer import class_path
from library.options.groups.optimizer import OptimizerOptions
from library.training.stepped_state import stepped_bytes


def what_is_traced(optimizer: OptimizerOptions) -> OptimizerOptions:
    """Return the optimizer that stands for another one in the trace: one that makes tensors of the same sizes, or none."""
    path = class_path(optimizer)
    if path in KEPT_BY_BITSANDBYTES or untraceable(optimizer):
        stands_in: dict[str, Any] = {
            "optimizer_type": "SGD",
            "optimizer_args": None,
            "use_8bit_adam": False,
            "use_lion_optimizer": False,
        }
    elif path == ADAFACTOR:
        stands_in = {"optimizer_args": (*(optimizer.optimizer_args or ()), "scale_parameter=False")}
    else:
        return optimizer
    return optimizer.model_copy(update=stands_in)


def computed_state(optimizer: OptimizerOptions, parameters: Sequence[nn.Parameter]) -> int:
    """Return the bytes of the state on the device that is not traced, because a stand-in keeps none.

    Args:
        optimizer: as it was asked for.
        parameters: that it steps.
    """
    if optimizer.optimizer_states == "host":
        return 0
    kept = KEPT_BY_BITSANDBYTES.get(class_path(optimizer))
    if kept is not None:
        return sum(kept_bytes(parameter.numel(), *kept) for parameter in parameters)
    return stepped_bytes(optimizer, parameters) if untraceable(optimizer) else 0


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return what an optimizer steps, without what never gets a gradient."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad]


def step_each_kind_once(updater: Updater, counter: StorageCounter) -> None:
    """Have parameters that are stepped inside the backward pass, and differ in nothing but their values, traced once.

    Args:
        updater: of the run that is traced.
        counter: counts the trace.
    """
    if not isinstance(updater, UpdateInBackward):
        return
    step = updater.steps.step

    def step_or_count(parameters: Sequence[nn.Parameter], seed: int) -> None:
        kind = tuple((kind_of(each), None if each.grad is None else kind_of(each.grad)) for each in parameters)

        def step_and_drop() -> None:  # as the updater would next: a gradient in another type is what is left behind
            step(parameters, seed)
            for parameter in parameters:
                parameter.grad = None

        counter.once(step_and_drop, kind)

    updater.steps.step = step_or_count  # type: ignore[method-assign]


def use_kernels_of(optimizer: torch.optim.Optimizer, device_type: str) -> None:
    """Step with the kernels that training would use on a device, where the arguments do not choose others.

    Args:
        optimizer: as `make_optimizer` gives it, on the CPU.
        device_type: "cuda" or "cpu".
    """
    choose_kernels(optimizer, device_type)
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group.get("fused"):
            group["fused"] = None  # has no fake kernel and would run on real memory; both kernels make nothing
        if device_type == "cuda" and group.get("foreach", False) is None and not (group.get("fused") or group["differentiable"]):
            group["foreach"] = True  # torch's choice on a GPU
