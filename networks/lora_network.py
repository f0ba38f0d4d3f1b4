"""All LoRA adapters of a model as one module: applying, training, saving, merging."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library.files.hashes import add_network_hashes
from library.files.tensors import save_tensors, to_save
from library.options.errors import UserError
from networks.lora_args import LoRAArgs
from networks.lora_blocks import block_index
from networks.lora_files import RankAndAlpha, read_lora
from networks.lora_module import Dropouts, LoRAModule, delta_weight
from networks.lora_norms import NormReport, limit_norms
from networks.lora_together import LoRABlock
from networks.targets import Target

logger = logging.getLogger(__name__)


class LoadReport(NamedTuple):
    """What loading a file into the network found."""

    missing: list[str]
    """Tensors of the network that the file does not have; they keep their initial values."""
    unexpected: list[str]
    """Tensors of the file that the network does not have; they are not used."""

    def __str__(self) -> str:
        if not self.missing and not self.unexpected:
            return "every tensor was found"
        return f"{len(self.missing)} tensors are not in the file, {len(self.unexpected)} of the file are not used"


class LoRANetwork(nn.Module):
    """The adapters of a U-Net and its text encoders.

    They become parameters of this module when `apply_to` puts them into the models, and only those of the parts it names.
    Dropouts draw from torch's global generators, see `LoRAModule`.

    Args:
        sized: what to adapt, with rank and alpha.
        multiplier: strength of all adapters.
        dropouts: act in training mode only.
        args: where the learning-rate factors and LoRA+ ratios are.

    Raises:
        UserError: there is nothing to adapt.
    """

    def __init__(
        self,
        sized: Sequence[tuple[Target, RankAndAlpha]],
        multiplier: float = 1.0,
        dropouts: Dropouts | None = None,
        args: LoRAArgs | None = None,
    ) -> None:
        super().__init__()
        if not sized:
            raise UserError(
                "The network has no adapters: no layer of the model is to be adapted. Check the ranks of --network_args."
            )
        self.multiplier = multiplier
        self.args = args or LoRAArgs()
        self._adapters: dict[str, LoRAModule] = {}
        for target, (rank, alpha) in sized:
            if target.name in self._adapters:
                raise ValueError(f"two layers are called {target.name}")
            self._adapters[target.name] = LoRAModule(target.layer, rank, alpha, multiplier, dropouts)

    @property
    def adapters(self) -> Mapping[str, LoRAModule]:
        """The adapters by their names in files."""
        return self._adapters

    def apply_to(self, text_encoders: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Put the adapters into the layers' forward passes.

        Args:
            text_encoders: not used; the layers were found when the network was made.
            unet: adapters of one of its blocks work together where the block says which layers share an input.
            apply_text_encoder: whether adapters of text encoders are kept.
            apply_unet: whether adapters of the U-Net are kept.

        Raises:
            UserError: nothing is left.
        """
        self._adapters = {
            name: adapter for name, adapter in self._adapters.items() if (apply_unet if _is_unet(name) else apply_text_encoder)
        }
        if not self._adapters:
            raise UserError(
                "The network has nothing to train: the parts left on have no adapters. Check --network_train_unet_only."
            )
        for name, adapter in self._adapters.items():
            adapter.apply_to()
            self.add_module(name, adapter)
        by_layer = {id(adapter.layer): adapter for adapter in self._adapters.values()}
        for block in unet.modules() if isinstance(unet, nn.Module) else ():
            if hasattr(block, "shared_inputs"):
                LoRABlock(block, by_layer).apply_to()
        counts = ", ".join(f"{len(list(names))} in {part}" for part, names in groupby(self._adapters, _part))
        logger.info("LoRA adapters: %s.", counts)

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of all adapters."""
        self.multiplier = multiplier
        for adapter in self._adapters.values():
            adapter.multiplier = multiplier

    def set_enabled(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        for adapter in self._adapters.values():
            adapter.enabled = enabled

    def load_weights(self, file: str) -> LoadReport:
        """Load a file into the applied network; alphas come from the file, so that its effect stays the same.

        Raises:
            UserError: an adapter of the file has another rank or shape, or the file fits nothing.
        """
        weights = read_lora(file)
        own = self.state_dict()
        for name, tensor in weights.items():
            if name in own and tensor.shape != own[name].shape:
                raise UserError(_shape_difference(file, name, tensor, own[name]))
        report = LoadReport(*map(list, self.load_state_dict(weights, strict=False)))
        if len(report.missing) == len(own):
            raise UserError(f"{file} fits nothing in this network: it names {report.unexpected[0]}. Is it for another model?")
        if report.missing:
            logger.warning("%s lacks %d of %d tensors, %s first.", file, len(report.missing), len(own), report.missing[0])
        if report.unexpected:
            logger.warning("%s: %d tensors are not used, %s first.", file, len(report.unexpected), report.unexpected[0])
        return report

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """Write the adapters atomically.

        Args:
            file: `.safetensors`, or with any other extension a PyTorch pickle without metadata and hashes.
            dtype: of all tensors; None keeps that of the matrices and float32 for the alphas.
            metadata: the file's hashes are added to it; None for a file without any.

        Raises:
            UserError: the disk is full or the folder not writable.
        """
        tensors = to_save(self.state_dict(), dtype)
        if metadata is not None and Path(file).suffix.lower() == ".safetensors":
            add_network_hashes(metadata, tensors)
        save_tensors(file, tensors, metadata)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lrs: float | Sequence[float | None] | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the parameter groups and their names; a part with the rate 0 or None is not trained and needs no gradients.

        Args:
            text_encoder_lrs: one rate for every encoder or one for each; None stands for `default_lr`, also within a list.
            unet_lr: None stands for `default_lr`.
            default_lr: `--learning_rate`.

        Raises:
            UserError: more rates than encoders, or nothing is trained.
        """
        encoders = sorted({_part(name) for name in self._adapters if not _is_unet(name)})
        rates = dict(zip(encoders, _rate_per_encoder(text_encoder_lrs, encoders), strict=True)) | {"unet": unet_lr}
        groups: list[dict[str, Any]] = []
        descriptions: list[str] = []
        for part, rate in rates.items():
            for description, lr, adapters in self._learning_rates(part, default_lr if rate is None else rate):
                for name, parameters, own_lr in self._split_for_lora_plus(description, lr, adapters):
                    trained = bool(own_lr) and bool(parameters)
                    _set_trained(parameters, trained)
                    if trained:
                        groups.append({"params": parameters, "lr": own_lr})
                        descriptions.append(name)
        if not groups:
            raise UserError(
                "Nothing is trained: every learning rate is 0 or not given. Set --learning_rate, --unet_lr or --text_encoder_lr."
            )
        return groups, descriptions

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """As `prepare_optimizer_params_with_multiple_te_lrs` with one rate for all text encoders."""
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def get_trainable_params(self) -> list[nn.Parameter]:
        """Return the parameters that are trained: those to clip and to reduce over processes."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Do nothing: `prepare_optimizer_params` decided which parameters need gradients."""

    def enable_gradient_checkpointing(self) -> None:
        """Do nothing: adapters are computed again together with the block they are in."""

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Switch to training mode."""
        self.train()

    def apply_max_norm_regularization(self, max_norm: float, device: Any) -> NormReport:
        """Scale down every adapter whose weight change is larger than `max_norm`; see `limit_norms`."""
        return limit_norms(self._adapters.values(), max_norm)

    def is_mergeable(self) -> bool:
        """Tell that `merge_to` exists."""
        return True

    def merge_to(
        self,
        text_encoder: Any,
        unet: Any,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add multiplier·ΔW of a file to the models' weights, layer by layer, for a network that is not applied.

        Args:
            text_encoder: not used; the layers were found when the network was made.
            unet: not used.
            weights_sd: as `create_network_from_weights` returned them.
            dtype: what merged weights are stored in; None keeps each layer's own.
            device: where the sum is computed, in float32; None for where each layer is.
        """
        for name, adapter in self._adapters.items():
            where = device or adapter.layer.weight.device
            down, up = (weights_sd[f"{name}.{matrix}.weight"].to(where) for matrix in ("lora_down", "lora_up"))
            adapter.merge(delta_weight(down, up, float(weights_sd[f"{name}.alpha"]) / len(down)), dtype)

    def backup_weights(self) -> None:
        """Remember the layers' weights, for `restore_weights`."""
        for adapter in self._adapters.values():
            adapter.backup_weight()

    def pre_calculation(self) -> None:
        """Add the adapters to the layers' weights and switch them off: the models run at their own speed."""
        for adapter in self._adapters.values():
            adapter.merge(adapter.delta_weight())
            adapter.enabled = False

    def restore_weights(self) -> None:
        """Put the layers' weights back to the bit, as `backup_weights` found them, and switch the adapters on."""
        for adapter in self._adapters.values():
            adapter.restore_weight()

    def _learning_rates(self, part: str, lr: float | None) -> Iterator[tuple[str, float | None, list[LoRAModule]]]:
        """Yield description, rate and adapters of a part: of the whole, or of each U-Net block where blocks have own rates."""
        members = {name: adapter for name, adapter in self._adapters.items() if _part(name) == part}
        weights = self.args.lr_weights()
        if part != "unet" or weights is None:
            yield part, lr, list(members.values())
            return
        for block, names in groupby(members, block_index):
            weight = 1.0 if block is None else weights[block]
            yield f"unet_block{block}", None if lr is None else lr * weight, [members[name] for name in names]

    def _split_for_lora_plus(
        self, description: str, lr: float | None, adapters: Sequence[LoRAModule]
    ) -> list[tuple[str, list[Tensor], float | None]]:
        """Return description, parameters and rate of one group, or of D and U apart where U has a rate of its own (LoRA+)."""
        own = self.args.loraplus_unet_lr_ratio if description.startswith("unet") else self.args.loraplus_text_encoder_lr_ratio
        ratio = own or self.args.loraplus_lr_ratio
        if not ratio:
            return [(description, [weight for adapter in adapters for weight in adapter.parameters()], lr)]
        downs, ups = [adapter.lora_down.weight for adapter in adapters], [adapter.lora_up.weight for adapter in adapters]
        return [(description, downs, lr), (f"{description} plus", ups, None if lr is None else lr * ratio)]


def _is_unet(name: str) -> bool:
    return name.startswith("lora_unet_")


def _part(name: str) -> str:
    """Return the part of the model an adapter belongs to, as groups are called: "unet", "textencoder1", "textencoder2"."""
    prefix = name.split("_")[1]
    return "unet" if prefix == "unet" else f"textencoder{prefix.removeprefix('te')}"


def _rate_per_encoder(rates: float | Sequence[float | None] | None, encoders: Sequence[str]) -> list[float | None]:
    """Spread the given rates over the encoders that have adapters; a single one counts for all."""
    given = list(rates) if isinstance(rates, Sequence) else [rates]
    if not given:
        given = [None]
    if len(given) == 1:
        return given * len(encoders)
    numbers = [int(encoder.removeprefix("textencoder") or 1) for encoder in encoders]
    if encoders and len(given) > max(2, *numbers):
        raise UserError(
            f"--text_encoder_lr has {len(given)} values; there are {len(encoders)} text encoders. Give one value, or one for each."
        )
    return [given[number - 1] if number <= len(given) else None for number in numbers]


def _set_trained(parameters: Sequence[Tensor], trained: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trained)


def _shape_difference(file: str, name: str, found: Tensor, expected: Tensor) -> str:
    ranks = f"{tuple(found.shape)} in the file, {tuple(expected.shape)} in the network"
    if name.endswith("lora_down.weight") and found.shape[1:] == expected.shape[1:]:
        advice = f"Set the rank to {len(found)} (--network_dim, or conv_dim for 3×3 convolutions), or give --dim_from_weights"
    else:
        advice = "Give --dim_from_weights for another rank; another shape means another model"
    return f"{file} does not fit this network: {name} is {ranks}. {advice}."
