"""What can be trained, as the loop, the saver and the previews see it."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.files.atomic import atomic_write
from library.models.family import Family
from library.training.full_tensors import Gathered, full_tensors
from library.training.position import Position

log = logging.getLogger(__name__)


class Trainable(Protocol):
    """What is being trained: a network of adapters, or a whole model."""

    module: nn.Module
    """Holds every trained parameter; its state is what a resumed run takes up."""
    norms: Mapping[str, Tensor | float]
    """Norms after the last update, by the names trackers know; empty where none are kept."""

    def on_epoch_start(self) -> None:
        """Prepare for an epoch: training mode."""

    @property
    def set_strength(self) -> Callable[[float], None] | None:
        """Sets how strongly a network acts on the model; None where the model itself is trained."""

    def on_batch_start(self) -> None:
        """Called before each batch."""

    def before_step(self) -> None:
        """Called before an optimizer update that uses all gradients at once."""

    def after_update(self) -> None:
        """Called after each optimizer update, before the observers."""

    def evaluation(self) -> AbstractContextManager[None]:
        """Switch off, for previews, what only training has, and back on; every process of a run enters it at the same place."""

    def save(
        self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str], position: Position, gathered: Gathered
    ) -> None:
        """Write the trained model, atomically.

        Args:
            path: of the file or folder.
            dtype: of the saved weights; None keeps the one they have.
            metadata: written where the file format has room for it.
            position: the place in the run.
            gathered: the trained module where it is divided over processes.

        Raises:
            UserError: it cannot be written.
        """


_NORMS_OF_NETWORKS = {
    "norm/avg_key_norm": "weight_norms",
    "norm/avg_grad_norm": "grad_norms",
    "norm/avg_combined_norm": "combined_weight_norms",
}
"""Methods by which networks of other packages tell the norms of their modules, by the names trackers know."""


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
        if max_norm is not None and not hasattr(network, "apply_max_norm_regularization"):
            log.warning("--scale_weight_norms has no effect: the network has no apply_max_norm_regularization.")
            max_norm = None
        self.max_norm = max_norm
        self.strength = 1.0
        """How strongly the network acts on the model."""
        self.norms: Mapping[str, Tensor | float] = {}
        """With `max_norm`: adapters scaled down, mean norm, largest norm; else what the network itself keeps account of."""

    @property
    def is_ours(self) -> bool:
        """Whether the network is of this suite, and not of another package."""
        return type(self.network).__module__.partition(".")[0] in ("networks", "library")

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
            limited = self.network.apply_max_norm_regularization(self.max_norm, next(self.network.parameters()).device)
            self.norms = dict(zip(("max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm"), limited, strict=True))
        elif hasattr(self.network, "weight_norms"):
            self.norms = {
                name: norms.mean()
                for name, method in _NORMS_OF_NETWORKS.items()
                if (norms := getattr(self.network, method, lambda: None)()) is not None
            }

    def before_step(self) -> None:
        """Tell networks that want to know that all gradients are there."""
        for name in ("update_grad_norms", "update_norms"):
            getattr(self.network, name, lambda: None)()

    def set_strength(self, strength: float) -> None:
        """Set how strongly the network acts on the model; 1 unless a dataset asks for something else."""
        if strength != self.strength:
            self.network.set_multiplier(strength)
            self.strength = strength

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Switch dropout off for previews and saving, at full strength, and back to what it was."""
        strength = self.strength
        self.set_strength(1.0)
        try:
            with evaluation_mode(self.network):
                yield
        finally:
            self.set_strength(strength)

    def save(
        self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str], position: Position, gathered: Gathered
    ) -> None:
        """Write the network's weights, at full strength; see `Trainable.save`."""
        with self.evaluation():
            self._write(path, dtype, metadata)

    def _write(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        if self.is_ours:
            self.network.save_weights(str(path), dtype, dict(metadata))
            return
        with atomic_write(path, keeps_ending=True) as temporary:  # networks of other packages write in place
            self.network.save_weights(str(temporary), dtype, dict(metadata))


class ModelTrainable:
    """Parts of a model that are trained themselves.

    Args:
        family: writes the model, with the parts that were not trained as they are in the files it was read from.
        parts: the modules with trained parameters by the family's short names, such as "unet" and "te1".
        layout: of saved models, see `Family.save_model`.
        v_prediction: whether the denoiser predicts v.
        zero_terminal_snr: whether it is trained down to pure noise.

    Attributes:
        whole: entered to have whole parameters in every process, where they are divided.
    """

    norms: Mapping[str, Tensor | float] = MappingProxyType({})
    set_strength: Callable[[float], None] | None = None

    def __init__(
        self, family: Family, parts: Mapping[str, nn.Module], layout: str, *, v_prediction: bool, zero_terminal_snr: bool
    ) -> None:
        self.module: nn.Module = nn.ModuleDict(parts)
        self.family = family
        self.parts = dict(parts)
        self.layout = layout
        self.v_prediction = v_prediction
        self.zero_terminal_snr = zero_terminal_snr
        self.whole: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

    def on_epoch_start(self) -> None:
        """Put the parts in training mode, without which transformers does not checkpoint; none of them has dropout."""
        self.module.train()

    def on_batch_start(self) -> None:
        """Nothing changes from batch to batch."""

    def before_step(self) -> None:
        """Nothing is done with gradients."""

    def after_update(self) -> None:
        """Nothing is limited after an update."""

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Put the whole parts in evaluation mode for previews, and back."""
        with self.whole(), evaluation_mode(self.module):
            yield

    def save(
        self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str], position: Position, gathered: Gathered
    ) -> None:
        """Write the whole model; see `Trainable.save`."""
        self.family.save_model(
            path,
            self.layout,
            {name: trained_tensors(self.family, name, part, gathered) for name, part in self.parts.items()},
            dtype=dtype,
            metadata=metadata,
            v_prediction=self.v_prediction,
            zero_terminal_snr=self.zero_terminal_snr,
            progress=(position.epoch, position.update),
        )


def trained_tensors(family: Family, name: str, part: nn.Module, gathered: Gathered) -> dict[str, Tensor]:
    """Return the tensors of a part that are trained, under the names they have in files."""
    trained = {key for key, parameter in part.named_parameters() if parameter.requires_grad}
    file_names = family.file_names(name, part)
    return {file_names[key]: tensor for key, tensor in full_tensors(part, gathered) if key in trained}


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, and each of its parts back in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, was_training in modes:
            part.training = was_training
