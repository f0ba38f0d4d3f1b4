"""A model's trained parts divided over the processes, as accelerate's configuration asks for it (FSDP2).

PyTorch's `fully_shard` is applied to the parts themselves, because the step hides the model from accelerate; accelerate only
carries the settings. Every process keeps a share of each parameter, its gradient and its optimizer state, and has a block's whole
parameters while it computes with them.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import nn

from library.options.checks_distributed import wants_sharding
from library.options.errors import UserError
from library.training.setting import Setting, Trained
from library.training.trainable import ModelTrainable

if TYPE_CHECKING:  # the import takes most of a second
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

log = logging.getLogger(__name__)


class Shards:
    """The parts of a model, divided over all processes.

    Args:
        parts: modules on the device they are trained on, in the type of trained weights; changed in place.
        settings: of accelerate's configuration: which modules are gathered together, and whether their whole parameters are freed
            after the forward pass.
        units: classes of modules that are gathered together where the settings name none.
        mesh: the processes.
        compute: the type parameters are gathered in; gradients are exchanged in float32.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        settings: FullyShardedDataParallelPlugin,
        units: Sequence[str],
        mesh: "DeviceMesh",
        compute: torch.dtype,
    ) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self._frees = bool(settings.reshard_after_forward)
        self._roots: list[FSDPModule] = []
        self._units: list[FSDPModule] = []
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        gathered = gathered_together(parts, settings, units)
        for part in parts.values():
            part.to(memory_format=torch.contiguous_format)  # others cannot be divided
            for module in [module for module in part.modules() if module is not part and gathered(module)][::-1]:
                self._units.append(fully_shard(module, mesh=mesh, reshard_after_forward=self._frees, mp_policy=policy))
            self._roots.append(fully_shard(part, mesh=mesh, reshard_after_forward=False, mp_policy=policy))

    def sentence(self) -> str:
        """Say what is divided."""
        processes = torch.distributed.get_world_size()
        return f"Divided over {processes} processes (FSDP2); {len(self._units)} modules are gathered one by one."

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """While entered every process has all parameters, so that each may run the model as often as it likes."""
        for unit in [*self._roots, *self._units]:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in self._units:
                unit.set_reshard_after_forward(self._frees, recurse=False)
            for unit in [*self._units, *self._roots]:
                unit.reshard()


def divided(setting: Setting, trained: Trained) -> Trained:
    """Divide what is trained over all processes where accelerate's configuration says so.

    Raises:
        UserError: the configuration names a class that nothing trained has.
    """
    settings = sharding_settings(setting.accelerator.num_processes)
    if settings is None or not isinstance(trained.trainable, ModelTrainable):
        return trained
    device, compute, units = setting.accelerator.device, setting.dtypes.compute, setting.family.large_modules
    shards, groups = shard_parts(trained.trainable.parts, trained.groups, settings, units, device, compute)
    trained.trainable.whole = shards.whole
    log.info("%s", shards.sentence())
    return replace(trained, groups=groups, is_divided=True)


def sharding_settings(num_processes: int) -> FullyShardedDataParallelPlugin | None:
    """Return the settings of accelerate's configuration, or None where nothing is divided."""
    return FullyShardedDataParallelPlugin() if wants_sharding(os.environ) and num_processes > 1 else None


def shard_parts(
    parts: Mapping[str, nn.Module],
    groups: Sequence[Mapping[str, Any]],
    settings: FullyShardedDataParallelPlugin,
    units: Sequence[str],
    device: torch.device,
    compute: torch.dtype,
) -> tuple[Shards, list[dict[str, Any]]]:
    """Divide the trained parts of a model over all processes.

    Args:
        parts: see `Shards`.
        groups: parameter groups over the parts.
        settings: see `sharding_settings`.
        units: see `Shards`.
        device: of this process.
        compute: see `Shards`.

    Returns:
        The shards, and the groups with the shares in place of the parameters.
    """
    from torch.distributed.device_mesh import init_device_mesh

    names = {id(parameter): (part, name) for part in parts for name, parameter in parts[part].named_parameters()}
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    shards = Shards(parts, settings, units, mesh, compute)
    shares = {(part, name): parameter for part in parts for name, parameter in parts[part].named_parameters()}
    return shards, [{**group, "params": [shares[names[id(each)]] for each in group["params"]]} for group in groups]


def gathered_together(
    parts: Mapping[str, nn.Module], settings: FullyShardedDataParallelPlugin, units: Sequence[str]
) -> Callable[[nn.Module], bool]:
    """Return what tells whether a module's parameters are gathered together, apart from those of the modules around it.

    `fsdp_min_num_params` and `fsdp_transformer_layer_cls_to_wrap` of accelerate's configuration win over `units`.

    Raises:
        UserError: a class is named that the parts do not have.
    """
    if settings.min_num_params:
        least = settings.min_num_params
        return lambda module: sum(parameter.numel() for parameter in module.parameters()) >= least
    named = settings.transformer_cls_names_to_wrap
    wanted = set(named or units)
    present = {type(module).__name__ for part in parts.values() for module in part.modules()}
    if named and (unknown := sorted(wanted - present)):
        raise UserError(
            f"accelerate's configuration names the class {unknown[0]} in fsdp_transformer_layer_cls_to_wrap, which nothing that is "
            f"trained has. Leave the key out, or name some of {', '.join(sorted(set(units) & present))}."
        )
    return lambda module: type(module).__name__ in wanted
