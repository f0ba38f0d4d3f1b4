"""Optimizer state, gradients and weights divided over processes by DeepSpeed (ZeRO), in main memory if that is wanted.

With stages 1 and 2 every process has the whole model in the type it is trained in; after each update the processes exchange what
they updated. With stage 3 they gather a layer's weights while they compute with it. With stage 0 DeepSpeed only averages the
gradients. The package is optional and is asked for the division alone: precision, schedules, batches and files are those of every
other run.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.optim.finite import FiniteGate
from library.optim.gradient_norms import GradientNorms
from library.options.errors import UserError
from library.options.groups.distributed import DistributedOptions
from library.training.full_tensors import full_shape

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


@dataclass(frozen=True)
class Place:
    """Where the elements of a parameter are that this process steps; all of it may be empty."""

    share: Tensor
    """Flat; has elements of many parameters."""
    start: int
    """Of the elements in the share."""
    parameter_start: int
    """Of the elements in the parameter."""
    count: int

    def own(self, state: Tensor) -> Tensor:
        """Return the elements in the share, or in state of the optimizer that lies as the share does."""
        return state.narrow(0, self.start, self.count)

    def fragment(self, whole: Tensor) -> Tensor:
        """Return the same elements, flat, of a tensor like the whole parameter."""
        return whole.view(-1).narrow(0, self.parameter_start, self.count)


class GroupShares:
    """Stages 1 and 2: a process steps one stretch of all parameters of a group, laid end to end."""

    def place(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> Place:
        """Find a parameter, given its group."""
        share = group["params"][0]
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return Place(share, 0, 0, 0)
        stepped, own = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        return Place(share, stepped.start, own.start, stepped.numel)


class DividedShares:
    """Stage 3: a process steps its part of each parameter; parts are of one size, the last one filled up.

    Args:
        inner: DeepSpeed's optimizer.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def place(self, parameter: Any, group: Mapping[str, Any]) -> Place:
        """Find a parameter, given its group."""
        number, start, size = self._inner.grad_position[self._inner.get_param_id(parameter)]
        before = size * torch.distributed.get_rank()
        count = max(0, min(size, parameter.ds_numel - before))
        return Place(self._inner.fp32_partitioned_groups_flat[number], start, before if count else 0, count)


class ZeroOptimizer:
    """The optimizer as states see it: with the parameters it was made over, not the shares it steps.

    Args:
        optimizer: whose groups DeepSpeed has given shares of their parameters.
        inner: DeepSpeed's own around it.
        parameters: of each group, whole.
        shares: finds parameters in the shares.
    """

    restores_exactly = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        inner: Any,
        parameters: Sequence[Sequence[nn.Parameter]],
        shares: GroupShares | DividedShares,
    ) -> None:
        self.optimizer = optimizer
        self._inner = inner
        self._parameters = parameters
        self._shares = shares

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups as they are now, with whole parameters."""
        groups = zip(self.optimizer.param_groups, self._parameters, strict=True)
        return [{**group, "params": list(parameters)} for group, parameters in groups]

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of a group that says nothing else."""
        return self.optimizer.defaults

    def whole_state(self, *, keep: bool) -> dict[str, Any] | None:
        """Return the state dict that the same optimizer in one process would have, in main memory; every process calls it.

        Args:
            keep: whether this process wants it; None is returned elsewhere.
        """
        states: dict[int, dict[str, Any]] = {}
        for number, parameter, place in self._numbered():
            state = {key: _whole(parameter, place, value) for key, value in self.optimizer.state.get(place.share, {}).items()}
            if keep:
                states[number] = state
        numbers = iter(range(sum(map(len, self._parameters))))
        groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in self.param_groups]
        return {"state": states, "param_groups": groups} if keep else None

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take up the state of a run in any number of processes, and the parameters as they are now."""
        for group, told in zip(self.optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in told.items() if key != "params"})
        for number, parameter, place in self._numbered():
            state = self.optimizer.state[place.share]
            for key, value in saved["state"].get(number, {}).items():
                if getattr(value, "shape", None) != full_shape(parameter):
                    state[key] = value.clone() if isinstance(value, Tensor) else value
                    continue
                state.setdefault(key, torch.zeros_like(place.share, dtype=value.dtype))
                place.own(state[key]).copy_(place.fragment(value))
        self._inner.refresh_fp32_params()

    def _numbered(self) -> Iterator[tuple[int, nn.Parameter, Place]]:
        """Yield number and parameter of each that is trained, and where it is in what this process steps."""
        number = 0
        for group, parameters in zip(self.optimizer.param_groups, self._parameters, strict=True):
            for parameter in parameters:
                if parameter.requires_grad:
                    yield number, parameter, self._shares.place(parameter, group)
                number += 1


def _whole(parameter: nn.Parameter, place: Place, value: Any) -> Any:
    """Return state of the optimizer for a whole parameter, in main memory; every process calls it."""
    if not isinstance(value, Tensor) or value.shape != place.share.shape:
        return value.detach().cpu() if isinstance(value, Tensor) else value
    whole = torch.zeros(full_shape(parameter), dtype=value.dtype, device=parameter.device)
    place.fragment(whole).copy_(place.own(value))
    torch.distributed.all_reduce(whole)  # everybody has another part of it, and zeros elsewhere
    return whole.detach().cpu()
