"""Copies to the device that do not wait for it."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`; to a GPU through pinned memory, so that nothing waits."""
    if device.type == "cuda" and torch.cuda.is_available():  # a device may also be pretended, to forecast memory
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
