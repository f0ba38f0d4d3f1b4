"""Attaches networks to a loaded model: merged into its weights, or beside them with a strength that each picture may set."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from library.files.tensors import open_tensors
from library.generation.network_files import NetworkFile
from library.models.family import Components
from library.options.errors import UserError
from networks.loading import import_network_module
from networks.targets import encoders_for_module

logger = logging.getLogger(__name__)


class AttachedNetworks:
    """The networks of a run, attached.

    Args:
        files: all of them, in order.
        live: those beside the weights, with their files, in order.
        precalculated: whether the live ones are folded into the weights whenever their strengths change.
    """

    def __init__(self, files: Sequence[NetworkFile], live: Sequence[tuple[NetworkFile, Any]], *, precalculated: bool) -> None:
        self._files = files
        self._live = live
        self._precalculated = precalculated
        self._strengths: tuple[float, ...] | None = None

    def set_strengths(self, wanted: tuple[float, ...] | None) -> dict[str, float]:
        """Set the strengths of the live networks.

        Args:
            wanted: one per live network, the last one for all that follow; None: as given for the run.

        Returns:
            Name and strength of every network, the merged ones too.
        """
        strengths = tuple(file.multiplier for file, _ in self._live)
        if wanted:
            strengths = tuple(wanted[min(i, len(wanted) - 1)] for i in range(len(self._live)))
        if strengths != self._strengths:
            self._apply(strengths)
        shown = {file.name: file.multiplier for file in self._files}
        return shown | {file.name: strength for (file, _), strength in zip(self._live, strengths, strict=True)}

    def _apply(self, strengths: tuple[float, ...]) -> None:
        networks = [network for _, network in self._live]
        if self._precalculated and self._strengths is not None:
            for network in networks:
                network.restore_weights()
        for network, strength in zip(networks, strengths, strict=True):
            network.set_multiplier(strength)
        if self._precalculated:
            # Every network remembers the original weights before any of them adds its own part.
            for network in networks:
                network.backup_weights()
            for network in networks:
                network.pre_calculation()
        self._strengths = strengths


def attach_networks(
    files: Sequence[NetworkFile],
    components: Components,
    *,
    dtype: torch.dtype,
    device: torch.device,
    precalculate: bool,
    show_metadata: bool,
) -> AttachedNetworks:
    """Load network files into a model.

    Args:
        files: what to attach.
        components: the loaded model; its text encoders and denoiser are changed.
        dtype: number type of networks that stay beside the weights, and of merged weights.
        device: where the model is.
        precalculate: fold live networks into the weights instead of running them beside.
        show_metadata: log what the files say of themselves.

    Raises:
        UserError: a file does not fit this model, or its module cannot do what was asked.
    """
    live = []
    for file in files:
        if show_metadata:
            logger.info(f"{file.path}: {open_tensors(file.path).metadata}")
        network, tensors = _create(file, components)
        _check_matches(file, network, tensors)
        if file.merge:
            _require(file, network, "merge_to", "--network_merge")
            network.merge_to(components.text_encoders, components.denoiser, tensors, dtype, device)
            continue
        network.apply_to(components.text_encoders, components.denoiser, True, True)
        network.load_state_dict(tensors, strict=False)
        network.to(device, dtype).eval().requires_grad_(False)
        if precalculate:
            _require(file, network, "pre_calculation", "--network_pre_calc")
        live.append((file, network))
    return AttachedNetworks(files, live, precalculated=precalculate)


def _create(file: NetworkFile, components: Components) -> tuple[Any, dict[str, Tensor]]:
    network, tensors = import_network_module(file.module).create_network_from_weights(
        file.multiplier,
        file.path,
        components.vae,
        encoders_for_module(file.module, components.text_encoders),
        components.denoiser,
        for_inference=True,
        **file.args,
    )
    if network is None:
        raise UserError(f"{file.path}: {file.module} makes no network of this file; choose the module it was trained with.")
    return network, tensors


def _check_matches(file: NetworkFile, network: Any, tensors: dict[str, Tensor]) -> None:
    """Log how many modules of the file have a place in the model; complain where none has."""
    in_file = {key.partition(".")[0] for key in tensors}
    matched = in_file & _module_names(network)
    if not matched:
        raise UserError(
            f"{file.path}: none of its {len(in_file)} modules (such as {min(in_file, default='nothing')}) fits this model with "
            f"{file.module}. Either it was trained for another kind of model, or with another network module."
        )
    logger.info(f"{file.path}: {len(matched)} of {len(in_file)} modules attached, strength {file.multiplier:g}")


def _module_names(network: Any) -> set[str]:
    """Return the names of a network's modules: our own networks map them, others list modules that know their names."""
    listed = [module for part in ("text_encoder_loras", "unet_loras") for module in getattr(network, part, ())]
    return {*getattr(network, "adapters", ()), *(module.lora_name for module in listed)}


def _require(file: NetworkFile, network: Any, method: str, option: str) -> None:
    mergeable = not hasattr(network, "is_mergeable") or network.is_mergeable()
    if not hasattr(network, method) or not mergeable:
        raise UserError(f"{file.path}: networks of {file.module} cannot be folded into the weights; leave out {option}.")
