"""A device that is not there: what a training step asks of accelerate, in one process, for tracing under fake tensors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from library.files.safetensors_io import TensorFile


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Make tensors of shapes and types without data; modules of them can be moved and converted, which PyTorch refuses.

    Of files with tensors only what their headers say is read.
    """
    apply, read = nn.Module._apply, TensorFile.__getitem__
    nn.Module._apply = _apply_to_each  # type: ignore[method-assign]
    TensorFile.__getitem__ = _without_values  # type: ignore[method-assign]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]
        TensorFile.__getitem__ = read  # type: ignore[method-assign]


def _without_values(file: TensorFile, name: str) -> Tensor:
    return torch.empty(file.infos[name].shape, dtype=file.infos[name].dtype)


def _apply_to_each(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do what `nn.Module._apply` does, with new parameters in the place of those that change."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                changed = change(parameter)
            if changed is not parameter:
                module._parameters[name] = nn.Parameter(changed, requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


class PretendAccelerator:
    """Stands for `accelerate.Accelerator` of one process.

    Args:
        device: that tensors pretend to be on.
        autocast_dtype: what the prepared module computes in; None without mixed precision.
        num_processes: that share the data; this is the first of them.
    """

    host = torch.device("meta")
    """Stands for main memory: what is there does not count."""
    process_index = 0
    is_main_process = True
    is_local_main_process = True
    ddp_handler = None
    scaler = None
    optimizer_step_was_skipped = False

    def __init__(self, device: torch.device, autocast_dtype: torch.dtype | None, num_processes: int = 1) -> None:
        self.device = device
        self.num_processes = num_processes
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
