"""ControlNet-LLLite: small modules that make a frozen U-Net follow control images such as outlines or depth.

One module stands before each query, key and value of the self-attentions, and before each query of the cross-attentions, in the
transformers of the U-Net's input blocks and its middle block.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library.files.tensors import open_tensors, save_tensors, to_save
from library.options.errors import UserError
from networks.lllite_module import LLLiteModule

_TARGET = re.compile(r"(?:input_blocks|middle_block)\..*\.(?:attn1\.to_[qkv]|attn2\.to_q)")
_HALVES = re.compile(r"input_blocks\.\d+\.0\.op")
"""The convolutions from which on tokens are twice as far apart."""


class Widths(NamedTuple):
    """The two sizes of a network's modules."""

    cond_emb_dim: int
    mlp_dim: int


class ControlNetLLLite(nn.Module):
    """The LLLite modules of a U-Net; without effect until `apply_to` and `see` were called, and untrained even then.

    Args:
        unet: frozen; found by name are its transformers' layers.
        widths: of every module.
        dropout: see `LLLiteModule`.
        multiplier: strength of all modules.

    Raises:
        UserError: the U-Net has no layer to adapt.
    """

    def __init__(self, unet: nn.Module, widths: Widths, dropout: float = 0.0, multiplier: float = 1.0) -> None:
        super().__init__()
        self.widths = widths
        for name, layer, depth in _targets(unet):
            self.add_module(name, LLLiteModule(layer, depth, *widths, dropout=dropout, multiplier=multiplier))
        if not self.adapters:
            raise UserError("ControlNet-LLLite finds no attention layers in the U-Net's input blocks. Is this an SDXL model?")

    @property
    def adapters(self) -> Mapping[str, LLLiteModule]:
        """The modules by their names in files."""
        return {name: module for name, module in self.named_children() if isinstance(module, LLLiteModule)}

    def apply_to(self) -> None:
        """Put the modules into the layers' forward passes."""
        for adapter in self.adapters.values():
            adapter.apply_to()

    def on_epoch_start(self, text_encoders: Any, unet: Any) -> None:
        """Switch to training mode."""
        self.train()

    def see(self, images: Tensor | None) -> None:
        """Take the control images that the next calls of the U-Net follow; see `library.models.control.Control`."""
        for adapter in self.adapters.values():
            adapter.see(images)

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of all modules; 0 leaves the U-Net as it is."""
        for adapter in self.adapters.values():
            adapter.multiplier = multiplier

    def load_weights(self, file: str) -> None:
        """Load a file into the modules.

        Raises:
            UserError: the file cannot be read, or is of another model or of other sizes.
        """
        self._load(read_lllite(file), file)

    def _load(self, weights: Mapping[str, Tensor], file: str) -> None:
        own = self.state_dict()
        for name in sorted(own.keys() ^ weights.keys()):
            raise UserError(f"{file} does not fit this model: {name} is only in one of the two. Is it for another model?")
        for name, tensor in weights.items():
            if tensor.shape != own[name].shape:
                found = widths_of(weights, file)
                raise UserError(
                    f"{file} does not fit this network: {name} is {tuple(tensor.shape)} in the file, "
                    f"{tuple(own[name].shape)} here. "
                    f"The file has --cond_emb_dim {found.cond_emb_dim} and --network_dim {found.mlp_dim}."
                )
        self.load_state_dict(weights)

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the modules atomically; see `library.models.control.Control`."""
        save_tensors(file, to_save(self.state_dict(), dtype), metadata)


def from_file(unet: nn.Module, file: str, multiplier: float = 1.0) -> ControlNetLLLite:
    """Make a network of the sizes of a file, with its weights, not applied yet.

    Args:
        unet: gets the modules.
        file: as `ControlNetLLLite.save_weights` or another trainer wrote it.
        multiplier: strength of all modules.

    Raises:
        UserError: the file is no LLLite file, or is of another model.
    """
    weights = read_lllite(file)
    network = ControlNetLLLite(unet, widths_of(weights, file), multiplier=multiplier)
    network._load(weights, file)
    return network


def read_lllite(file: str) -> dict[str, Tensor]:
    """Return the tensors of an LLLite file by name.

    Raises:
        UserError: it cannot be read, or is none.
    """
    weights = dict(open_tensors(file))
    if not weights or not all(name.startswith("lllite_unet_") for name in weights):
        raise UserError(f"{file} is no ControlNet-LLLite file: its tensors are not called lllite_unet_…. Give another file.")
    return weights


def widths_of(weights: Mapping[str, Any], file: str) -> Widths:
    """Read the sizes from the shapes of a file's tensors.

    Args:
        weights: the tensors by name.
        file: named in the error.

    Raises:
        UserError: the tensors that tell them are missing.
    """
    first = next((tensor for name, tensor in weights.items() if name.endswith(".conditioning1.0.weight")), None)
    down = next((tensor for name, tensor in weights.items() if name.endswith(".down.0.weight")), None)
    if first is None or down is None:
        raise UserError(f"{file} is an incomplete ControlNet-LLLite file: it has no conditioning1.0 or no down.0. Get it again.")
    return Widths(cond_emb_dim=2 * first.shape[0], mlp_dim=down.shape[0])


def _targets(unet: nn.Module) -> Iterator[tuple[str, nn.Linear, int]]:
    """Yield name in files, layer and depth of every layer that gets a module."""
    depth = 1
    for path, layer in unet.named_modules():
        if _HALVES.fullmatch(path):
            depth += 1
        elif _TARGET.fullmatch(path) and isinstance(layer, nn.Linear):
            yield f"lllite_unet_{path.replace('.', '_')}", layer, depth
