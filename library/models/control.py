"""Networks that make a denoiser follow images, as steps and pictures know them."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn


class Control(Protocol):
    """A network that makes the denoiser it is attached to follow control images."""

    def see(self, images: Tensor | None) -> None:
        """Take the control images that the next calls of the denoiser follow.

        Args:
            images: (N, 3, H, W) in [-1, 1], of the pictures' size in pixels, where the denoiser is given N rows or a multiple of N
                in which the images repeat in order; None for none.
        """

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength; 0 leaves the denoiser as it is."""

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the network atomically.

        Args:
            file: `.safetensors`, or with any other extension a PyTorch pickle without metadata.
            dtype: of all tensors; None keeps their own.
            metadata: of a safetensors file.

        Raises:
            UserError: the disk is full or the folder not writable.
        """

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the weights."""

    def modules(self) -> Iterator[nn.Module]:
        """Yield all modules, the network itself first."""


class ControlNet(Control, Protocol):
    """A trained copy of a denoiser's way down, whose outputs are added to the denoiser's own."""

    def apply_to(self, denoiser: nn.Module) -> None:
        """Take part in the denoiser's forward pass."""

    def copied_parameters(self) -> list[nn.Parameter]:
        """Return the weights that began as the denoiser's."""

    def new_parameters(self) -> list[nn.Parameter]:
        """Return the weights that the denoiser has no counterpart of."""
