"""What computes gradients and steps: one process, several that average gradients, or several that divide the work."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.optim.updates import Updater, make_updater
from library.options.groups.distributed import DistributedOptions
from library.training.accelerator import prepare
from library.training.setting import Setting, Trained
from library.training.trainable import ModelTrainable
from library.training.zero import ZeroRun, zero_config


@dataclass(frozen=True)
class Engine:
    """The objects a run is driven by."""

    accelerator: Any
    """`accelerate.Accelerator`, or what acts like it."""
    step: nn.Module
    """The step as it is called."""
    updater: Updater
    optimizer: Any
    """As states and logs see it."""


def make_engine(setting: Setting, trained: Trained, step: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    """Wrap step and optimizer for the processes and the precision of a run.

    Args:
        setting: of the run.
        trained: what is trained.
        step: computes the loss.
        optimizer: as `make_optimizer` gives it.
    """
    options, accelerator = setting.options, setting.accelerator
    distributed = options.distributed
    if isinstance(distributed, DistributedOptions) and distributed.deepspeed:
        batch_size = max(section.config.batch_size for section in setting.dataset.sections)
        config = zero_config(distributed, options.optimizer.max_grad_norm, batch_size, accelerator.num_processes)
        zero = ZeroRun(accelerator, step, optimizer, config)
        if distributed.zero_stage == 3 and isinstance(trained.trainable, ModelTrainable):
            trained.trainable.whole = zero.whole
        return Engine(zero.accelerator, zero.step, zero.updater, zero.optimizer)
    prepared_step, prepared = prepare(accelerator, step, optimizer, may_skip=trained.may_skip, is_divided=trained.is_divided)
    parameters = [parameter for group in trained.groups for parameter in group["params"]]
    updater = make_updater(optimizer, prepared, parameters, options.optimizer, accelerator)
    return Engine(accelerator, prepared_step, updater, prepared)
