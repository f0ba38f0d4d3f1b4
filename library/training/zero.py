"""Optimizer state, gradients and weights divided over processes by DeepSpeed (ZeRO), in main memory if that is wanted.

With stages 1 and 2 every process has the whole model in the type it is trained in; after each update the processes exchange what
they updated. With stage 3 they gather a layer's weights while they compute with it. With stage 0 DeepSpeed only averages the
gradients. The package is optional and is asked for the division alone: precision, schedules, batches and files are those of every
other run.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.optim.finite import FiniteGate
from library.optim.gradient_norms import GradientNorms
from library.options.errors import UserError
from library.options.groups.distributed import DistributedOptions
from library.training.zero_state import DividedShares, GroupShares, ZeroOptimizer

log = logging.getLogger(__name__)

KEPT_WHOLE = 100_000
"""Elements of the largest weights that stage 3 leaves whole: gathering them would cost more than they take."""


def zero_config(options: DistributedOptions, max_grad_norm: float, batch_size: int, num_processes: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Args:
        options: the stage, and where optimizer state and weights are kept.
        max_grad_norm: of all gradients together; 0 for no limit.
        batch_size: of one process; DeepSpeed only checks it.
        num_processes: of the run.
    """
    optimization: dict[str, Any] = {"stage": options.zero_stage}
    if options.offload_optimizer_device is not None:
        optimization["offload_optimizer"] = {"device": options.offload_optimizer_device}
    if options.offload_param_device is not None:
        optimization["offload_param"] = {"device": options.offload_param_device}
        if options.offload_param_nvme_path is not None:
            optimization["offload_param"]["nvme_path"] = options.offload_param_nvme_path
    if options.zero_stage == 3:
        optimization["stage3_param_persistence_threshold"] = KEPT_WHOLE
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "train_batch_size": batch_size * num_processes,
        "gradient_accumulation_steps": 1,  # the loop says which batch is the last before an update
        "gradient_clipping": max_grad_norm,
        "zero_optimization": optimization,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


class ZeroRun:
    """What a run has of DeepSpeed in place of accelerate's wrappers: an engine, an updater and an optimizer.

    Args:
        accelerator: of the run.
        step: computes the loss; its trained parameters are those of the optimizer.
        optimizer: made over the parameters; its steps must be the same on shares of them.
        config: see `zero_config`.
    """

    def __init__(self, accelerator: Accelerator, step: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
        import deepspeed

        _check_disks(config)
        stage = config["zero_optimization"]["stage"]
        groups = [list(group["params"]) for group in optimizer.param_groups]
        if stage == 3:
            step.to(memory_format=torch.contiguous_format)  # others cannot be divided
        wrapped = accelerator.prepare_model(step, device_placement=False, evaluation_mode=True)  # for mixed precision alone
        engine, inner, _, _ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=config, dist_init_required=False)
        self.accelerator = ZeroAccelerator(accelerator, engine)
        self.step: nn.Module = engine
        self.updater = ZeroUpdater(engine)
        shares = DividedShares(inner) if stage == 3 else GroupShares()
        self.optimizer = optimizer if stage == 0 else ZeroOptimizer(optimizer, inner, groups, shares)
        self._engine = engine
        what = "Divided over" if stage else "Gradients are averaged over"
        log.info("%s %d processes (DeepSpeed, ZeRO stage %d).", what, accelerator.num_processes, stage)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """While entered every process has all weights of stage 3, so that each may run the model as often as it likes."""
        from deepspeed.runtime.zero import unwrap_model_for_generation

        with unwrap_model_for_generation(self._engine):
            yield


def _check_disks(config: Mapping[str, Any]) -> None:
    """See that DeepSpeed can keep weights on disk where it is to.

    Raises:
        UserError: what it needs for that is not installed.
    """
    from deepspeed.accelerator import get_accelerator

    if config["zero_optimization"].get("offload_param", {}).get("device") != "nvme":
        return
    if not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible(verbose=False):
        raise UserError(
            "--offload_param_device nvme: DeepSpeed needs the library libaio for it. Install it with: apt install libaio-dev "
            "(or give --offload_param_device cpu)."
        )


class ZeroAccelerator:
    """The accelerator as the loop needs it; what DeepSpeed does otherwise is here."""

    def __init__(self, accelerator: Accelerator, engine: Any) -> None:
        self._accelerator = accelerator
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    @contextlib.contextmanager
    def no_sync(self, step: nn.Module) -> Iterator[None]:
        """While entered, batches are not the last before an update; DeepSpeed divides their gradients at once all the same."""
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""
        self._engine.backward(loss)


class ZeroUpdater:
    """Lets the engine clip, step and drop the gradients, which nobody else sees whole; see `library.optim.updates.Updater`."""

    gradient_norms: GradientNorms | None = None
    gate: FiniteGate | None = None

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.before_step: Callable[[], None] = lambda: None
        engine.set_gradient_accumulation_boundary(True)

    def begin(self, seed: int) -> None:
        """Nothing is drawn in an update."""

    def finish(self) -> bool:
        """Make the update, unless a loss was not finite: DeepSpeed keeps the gradients to itself, so the loss is waited for."""
        if self.gate is None or self.gate.is_open():
            self._engine.step()
        return True
