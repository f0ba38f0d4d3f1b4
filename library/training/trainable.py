"""What can be trained, as the loop, the saver and the previews see it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class NetworkTrainable:
    """A network module (LoRA and its kin, ours or a third party's) attached to frozen models.

    Args:
        network: an object that follows the network contract (`apply_to`, `save_weights`, …).
        denoiser: the frozen denoiser the network is attached to.
        text_encoders: the frozen encoders it may be attached to.
        max_norm: largest norm an adapter's weight change may have (`--scale_weight_norms`); None for no limit.
    """

    def __init__(
        self, network: Any, denoiser: nn.Module, text_encoders: Sequence[nn.Module | None], max_norm: float | None
    ) -> None:
        self.module: nn.Module = network
        self.network = network
        self.denoiser = denoiser
        self.text_encoders = list(text_encoders)
        self.max_norm = max_norm
        self.norms: Sequence[Tensor | float] | None = None
        """After an update with `max_norm`: adapters scaled down, mean norm, largest norm; tensors stay on the device."""

    def on_epoch_start(self) -> None:
        """Put the network in training mode."""
        self.network.train()
        self.network.on_epoch_start(self.text_encoders, self.denoiser)

    def on_batch_start(self) -> None:
        """Tell networks that want to know that a batch begins."""
        if hasattr(self.network, "on_step_start"):
            self.network.on_step_start(self.text_encoders, self.denoiser)

    def after_update(self) -> None:
        """Scale down adapters whose weight change grew too large."""
        if self.max_norm is not None:
            self.norms = self.network.apply_max_norm_regularization(self.max_norm, next(self.network.parameters()).device)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Switch dropout off for previews and saving, and back to what it was."""
        was_training = self.network.training
        self.network.eval()
        try:
            yield
        finally:
            self.network.train(was_training)

    def save(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the network's weights, atomically; `dtype` None keeps the dtype they are trained in."""
        self.network.save_weights(str(path), dtype, None if metadata is None else dict(metadata))
