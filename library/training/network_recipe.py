"""How a network of adapters is made, trained and described: the recipe of `sdxl_train_network.py`."""

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.dataset.facts import metadata_facts
from library.models.family import Family
from library.optim.optimizers import describe_optimizer
from library.options.errors import UserError
from library.options.groups.network import NetworkOptions
from library.options.record import option_values
from library.options.scripts import SdxlTrainNetworkOptions
from library.training.data_terms import needs_strength
from library.training.frozen_model import FrozenModelRecipe
from library.training.metadata import (
    RunRecord,
    at_save,
    base_weights_keys,
    hash_sources,
    minimal,
    network_metadata,
    network_record,
    source_names,
)
from library.training.modelspec import model_spec
from library.training.position import Position
from library.training.preparation import TextSide
from library.training.setting import MetadataAt, Setting, Trained
from library.training.trainable import NetworkTrainable
from networks.loading import import_network_module, parse_network_args
from networks.lora_network import LoRANetwork
from networks.targets import encoders_for_module

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NetworkRecipe(FrozenModelRecipe):
    """Trains what `--network_module` makes and leaves the model as it is."""

    options: SdxlTrainNetworkOptions

    tracker_name = "network_train"

    def make_trainable(self, setting: Setting, denoiser: nn.Module, text: TextSide, vae: nn.Module | None) -> Trained:
        """Make the network, attach it to the denoiser and to the text encoders that are trained, and load its weights."""
        options, device = self.options, setting.accelerator.device
        rates = text_encoder_rates(options.network, options.optimizer.learning_rate, text.encoders)
        encoders = [encoder for encoder in text.encoders if encoder is not None]
        trains_text = any(rates)
        trains_denoiser = not options.network.network_train_text_encoder_only

        network = make_network(options.network, vae, text.encoders if trains_text else [], denoiser)
        if needs_strength(setting.dataset.config) and not hasattr(network, "set_multiplier"):
            raise UserError(
                f"The network of {options.network.network_module} has a fixed strength: it has no set_multiplier. Remove "
                "network_multiplier and diff_output_preservation from the dataset file."
            )
        network.apply_to(encoders, denoiser, trains_text, trains_denoiser)
        if options.network.network_weights:
            log.info("Loaded %s: %s", options.network.network_weights, network.load_weights(options.network.network_weights))
        if options.precision.gradient_checkpointing:
            network.enable_gradient_checkpointing()
            setting.family.enable_text_checkpointing(encoders if trains_text else [])
        network.to(device, setting.dtypes.trained)
        unet_rate = options.network.unet_lr if trains_denoiser else 0.0
        groups, descriptions = parameter_groups(network, rates, unet_rate, options.optimizer.learning_rate)
        network.prepare_grad_etc(encoders, denoiser)
        freeze_others(network, groups)
        trainable = NetworkTrainable(network, denoiser, encoders, options.network.scale_weight_norms)
        may_skip = not freeze_unused(network, setting.family, encoders) or needs_strength(setting.dataset.config)
        return Trained(trainable, groups, descriptions, trains_text, options.output.extension, may_skip)

    def metadata(self, setting: Setting, trained: Trained) -> MetadataAt:
        """Build what stays the same now; hashes of the base model are computed in the background until the first save."""
        options = self.options
        values = option_values(options)
        sources = (options.model.pretrained_model_name_or_path or "", options.model.vae)
        hashes = hash_sources(*sources) if setting.accelerator.is_main_process else None
        network = network_record(trained.trainable.module.state_dict(), options.network)
        fixed = network_metadata(
            values,
            run_record(setting),
            network,
            metadata_facts(setting.dataset, setting.accelerator.num_processes),
            setting.family.network_metadata() | source_names(*sources) | base_weights_keys(options.network),
        )
        spec = model_spec(setting, "LoRA", "/lora")

        def at(stem: str, position: Position) -> dict[str, str]:
            now = time.time()
            described = fixed if hashes is None else fixed | hashes.result()
            saved = at_save(described, stem, position.update, setting.length.epochs_finished(position.update), now)
            return (minimal(saved) if options.network.no_metadata else saved) | spec.at_save(now)

        return at


def text_encoder_rates(options: NetworkOptions, default: float, encoders: Sequence[nn.Module | None]) -> list[float]:
    """Return the learning rate of each text encoder; all 0 where none is trained.

    Text outputs that are there beforehand are those of encoders that do not change, so with them the U-Net alone is trained, and
    a warning says so.

    Args:
        options: the rates asked for and what is excluded.
        default: `--learning_rate`.
        encoders: None for those that are not needed, or no longer.
    """
    if options.network_train_unet_only:
        return [0.0] * len(encoders)
    if all(encoder is None for encoder in encoders):
        log.warning("Text encoder outputs are there beforehand, so the U-Net alone is trained (as with --network_train_unet_only).")
        return [0.0] * len(encoders)
    return [default if rate is None else rate for rate in options.text_encoder_rates()]


def freeze_unused(network: Any, family: Family, encoders: Sequence[nn.Module]) -> bool:
    """Freeze the adapters of layers whose output nothing reads, such as the last one of CLIP-L: they never get a gradient.

    Args:
        network: applied, its parameter groups made.
        family: knows the layers.
        encoders: the text encoders.

    Returns:
        Whether all that is left to train gets a gradient in every batch; False where the network does not say, or drops modules.
    """
    if not isinstance(network, LoRANetwork):
        return False
    unused = {id(parameter) for encoder in encoders for parameter in family.unused_text_parameters(encoder)}
    for adapter in network.adapters.values():
        if id(adapter.layer.weight) in unused:
            adapter.requires_grad_(False)
    return all(adapter.dropouts.module == 0 for adapter in network.adapters.values())


def make_network(options: NetworkOptions, vae: nn.Module | None, encoders: Sequence[nn.Module | None], denoiser: nn.Module) -> Any:
    """Make the network that was asked for, not attached yet.

    Args:
        options: which network.
        vae: part of the contract with network modules.
        encoders: those that get adapters, in the family's order; None keeps the place of one that is not loaded.
        denoiser: gets adapters.

    Raises:
        UserError: the module makes no network of these arguments.
    """
    name = options.network_module or "networks.lora"
    module = import_network_module(name)
    encoders = encoders_for_module(name, encoders)
    arguments: dict[str, Any] = {"dropout": options.network_dropout, **parse_network_args(options.network_args)}
    if options.dim_from_weights:
        network, _ = module.create_network_from_weights(1.0, options.network_weights, vae, encoders, denoiser, **arguments)
    else:
        network = module.create_network(
            1.0,
            options.network_dim,
            options.network_alpha,
            vae,
            encoders,
            denoiser,
            neuron_dropout=options.network_dropout,
            **arguments,
        )
    if network is None:
        raise UserError(f"--network_module {options.network_module} made no network of these --network_args.")
    return network


def parameter_groups(
    network: Any, encoder_rates: Sequence[float], unet_rate: float | None, default: float
) -> tuple[list[dict[str, Any]], list[str | None]]:
    """Ask a network for its parameter groups, in the newest form of the contract it knows; groups with the rate 0 are left out.

    Args:
        network: applied.
        encoder_rates: of each text encoder; 0 for one that is not trained.
        unet_rate: None for `default`; 0 where the U-Net is not trained.
        default: `--learning_rate`.

    Returns:
        The groups, each with its rate, and what each trains (None where the network does not say).

    Raises:
        UserError: every rate is 0, or a part would train with the rate of another.
    """
    unet_rate = default if unet_rate is None else unet_rate
    if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
        found = network.prepare_optimizer_params_with_multiple_te_lrs(list(encoder_rates), unet_rate, default)
    else:
        if len(set(encoder_rates)) > 1:
            raise UserError(
                f"{_module_of(network)} has one learning rate for all text encoders, but {_listed(encoder_rates)} were asked for. "
                "Give one --text_encoder_lr, or none of them with --network_train_unet_only."
            )
        found = network.prepare_optimizer_params(next(iter(encoder_rates), 0.0), unet_rate, default)
    groups, descriptions = found if isinstance(found, tuple) else (found, [None] * len(found))
    asked = {rate for rate in (*encoder_rates, unet_rate) if rate}
    rated = [{**group, "params": list(group["params"]), "lr": _rate_of(network, group, asked)} for group in groups]
    told = [*descriptions, *[None] * len(rated)]  # a package may tell of fewer groups than it makes
    kept = [(group, described) for group, described in zip(rated, told, strict=False) if group["params"] and group["lr"]]
    if not kept:
        raise UserError("Nothing is trained: all learning rates are 0. Raise --learning_rate, --unet_lr or --text_encoder_lr.")
    return [group for group, _ in kept], [described for _, described in kept]


def _rate_of(network: Any, group: Mapping[str, Any], asked: set[float]) -> float:
    """Return the rate of a group: its own, or the one that was asked for everything.

    Raises:
        UserError: it has none, and parts were asked to have different ones.
    """
    if group.get("lr") is not None:
        return float(group["lr"])
    if len(asked) > 1:
        raise UserError(
            f"{_module_of(network)} made a parameter group without a learning rate, which would train with another part's: "
            f"{_listed(sorted(asked))} were asked for. Give every part the same rate: --learning_rate alone."
        )
    return next(iter(asked), 0.0)


def _module_of(network: Any) -> str:
    return f"The network {type(network).__module__}.{type(network).__qualname__}"


def _listed(rates: Sequence[float]) -> str:
    return " and ".join(f"{rate:g}" for rate in rates)


def freeze_others(network: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Freeze what is in no group: it would gather gradients that nothing uses, and take part in the norm that is limited."""
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    for parameter in network.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def run_record(setting: Setting) -> RunRecord:
    """Collect the facts of the run that metadata tells."""
    sections = setting.dataset.sections
    return RunRecord(
        session_id=random.SystemRandom().getrandbits(32),
        started_at=setting.started_at,
        seed=setting.seed,
        num_train_images=setting.dataset.num_train_uses,
        num_reg_images=sum(section.num_reg_images for section in sections),
        num_validation_images=len(setting.dataset.held_out),
        batches_per_epoch=setting.batches_per_epoch,
        num_epochs=setting.length.num_epochs,
        total_updates=setting.length.total_updates,
        optimizer=describe_optimizer(setting.options.optimizer),
    )
