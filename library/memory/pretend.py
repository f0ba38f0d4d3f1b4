"""A device that is not there: what a training step asks of accelerate, in one process, for tracing under fake tensors."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class PretendAccelerator:
    """Stands for `accelerate.Accelerator` of one process.

    Args:
        device: that tensors pretend to be on.
        autocast_dtype: what the prepared module computes in; None without mixed precision.
    """

    num_processes = 1
    process_index = 0
    is_main_process = True
    scaler = None
    optimizer_step_was_skipped = False

    def __init__(self, device: torch.device, autocast_dtype: torch.dtype | None) -> None:
        self.device = device
        self._autocast_dtype = autocast_dtype

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap the module's forward in autocast, as accelerate does; the optimizer stays as it is."""
        if self._autocast_dtype is not None:
            inner = module.forward
            dtype = self._autocast_dtype

            def forward(*args: Any) -> Any:
                with torch.autocast(self.device.type, dtype=dtype, cache_enabled=False):
                    return inner(*args)

            module.forward = forward
        return module, optimizer

    def no_sync(self, module: nn.Module) -> nullcontext[None]:
        """One process has nothing to exchange."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""
        loss.backward()

    def clip_grad_norm_(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Limit the norm of all gradients together."""
        return nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)  # torch's choice on a GPU
