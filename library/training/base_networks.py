"""Networks merged into the base model before training: `--base_weights`.

Nothing is merged twice or held twice: the base model's weights are changed one by one while they are read, in float32, and rounded
once to the type they are held in, 8 bits included. The text encoders' fingerprint changes with them, so caches follow.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.files.tensors import open_tensors
from library.models.family import Family, ModelSource
from library.options.errors import UserError
from library.options.groups.network import NetworkOptions
from networks.loading import import_network_module
from networks.lora_files import is_lora
from networks.lora_module import delta_weight
from networks.lora_network import LoRANetwork
from networks.targets import encoders_for_module

log = logging.getLogger(__name__)

LORA, LYCORIS = "networks.lora", "lycoris.kohya"
Change = Callable[[Tensor], Tensor]


def open_with_base_weights(open_family: Callable[[ModelSource], Family], options: NetworkOptions, source: ModelSource) -> Family:
    """Open a model with the networks of `--base_weights`, see `with_base_weights`; a part of this can be pickled."""
    return with_base_weights(open_family(source), options)


def with_base_weights(family: Family, options: NetworkOptions) -> Family:
    """Return a family whose weights have the networks of `--base_weights` added, in their order, whenever they are read.

    Args:
        family: opened.
        options: files and strengths, checked; a strength that is left out is 1.

    Raises:
        UserError: a file is not of this model, or its network cannot be merged.
    """
    strengths = [*(options.base_weights_multiplier or ())]
    for number, path in enumerate(options.base_weights or ()):
        strength = strengths[number] if number < len(strengths) else 1.0
        family = with_network(family, path, strength, module_of(path, options.network_module or LORA))
    return family


def module_of(path: str, network_module: str) -> str:
    """Return the network module that reads a file: of LoRA and LyCORIS the one that its tensors are of, else the one in use."""
    if network_module not in (LORA, LYCORIS):
        return network_module
    with open_tensors(path) as file:
        return LORA if is_lora(file) else LYCORIS


def with_network(family: Family, path: str, strength: float, module: str) -> Family:
    """Return a family whose weights have one network added whenever they are read.

    Args:
        family: opened.
        path: of the network file.
        strength: of the network; 0 leaves the model as it is.
        module: network module that reads the file.

    Raises:
        UserError: the file is not of this model, or its network cannot be merged.
    """
    skeletons = family.skeletons()
    encoders = encoders_for_module(module, [skeletons[name] for name in family.encoder_names])
    denoiser = skeletons[family.denoiser_name]
    network, tensors = import_network_module(module).create_network_from_weights(
        strength, path, None, encoders, denoiser, for_inference=True
    )
    if network is None:
        raise UserError(f"--base_weights {path}: {module} makes no network of this file.")
    names = {id(weight): (part, name) for part, made in skeletons.items() for name, weight in made.named_parameters()}
    changes: dict[str, dict[str, Change]] = {}
    for weight, change in _changes(network, tensors, strength, path, module):
        part, name = names[id(weight)]
        changes.setdefault(part, {})[name] = change
    counts = ", ".join(f"{len(changed)} layers of {part}" for part, changed in changes.items())
    log.info("--base_weights: %s at strength %g changes %s", path, strength, counts or "nothing")
    return family.with_changes(changes)


def _changes(
    network: Any, tensors: Mapping[str, Tensor], strength: float, path: str, module: str
) -> Iterator[tuple[Tensor, Change]]:
    """Yield each weight that a network changes, which has no values here, and what becomes of its values."""
    if isinstance(network, LoRANetwork):
        for name, adapter in network.adapters.items():
            down, up = (tensors[f"{name}.{matrix}.weight"] for matrix in ("lora_down", "lora_up"))
            yield adapter.layer.weight, partial(_with_lora, down, up, strength * float(tensors[f"{name}.alpha"]) / len(down))
        return
    listed: Sequence[Any] = [each for part in ("text_encoder_loras", "unet_loras") for each in getattr(network, part, ())]
    if not listed or not all(hasattr(each, "merge_to") and hasattr(each, "org_module") for each in listed):
        raise UserError(f"--base_weights {path}: networks of {module} cannot be merged into the base model. Leave it out.")
    for each in listed:
        yield each.org_module[0].weight, partial(_with_module, each, strength)


def _with_lora(down: Tensor, up: Tensor, scale: float, weight: Tensor) -> Tensor:
    return weight.float() + delta_weight(down, up, scale)


@torch.no_grad()
def _with_module(module: Any, strength: float, weight: Tensor) -> Tensor:
    """Let a module of another package change the layer it is made for, which has values meanwhile."""
    layer = module.org_module[0]
    empty = layer.weight
    layer.weight = nn.Parameter(weight.float().clone(), requires_grad=False)
    try:
        module.merge_to(strength)
        changed: Tensor = layer.weight.detach()
        return changed
    finally:
        layer.weight = empty
