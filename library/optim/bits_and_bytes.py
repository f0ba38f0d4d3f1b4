"""Two habits of bitsandbytes' optimizers that training is spared.

After each tensor they wait for the GPU, which then idles until the next one is asked for: a network of adapters has a thousand.
And a tensor that does not lie in rows, as kernels laid out channels last, they replace by a copy that does. Convolutions would be
slower from the first step on, and weights that are brought to the device in turn would lose their steps with the copy.
"""

from typing import Any

import torch
from torch import Tensor


def step_in_place(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of bitsandbytes leave tensors where they lie, and wait for the device only where its state is paged."""
    import bitsandbytes.optim.optimizer as theirs

    moved: list[tuple[Tensor, Tensor]] = []
    wait: Any = getattr(theirs, "sync_gpu", None)  # versions before this name are let be
    waits = wait is None or getattr(optimizer, "is_paged", False)

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        stepped = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        moved[:] = [(weight, weight.data) for weight in stepped if not weight.is_contiguous()]
        if not waits:
            theirs.sync_gpu = _go_on

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not waits:
            theirs.sync_gpu = wait
        for weight, place in moved:
            weight.data = place.copy_(weight.data)
        moved.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _go_on(tensor: Tensor) -> None:
    """What follows is queued on the stream of what was asked for, as everything of PyTorch's is."""
