"""Optimizer state and gradients divided over processes by DeepSpeed (ZeRO stages 1 and 2), in main memory if that is wanted.

Every process has the whole model in the type it is trained in; after each update the processes exchange what they updated. With
stage 0 DeepSpeed only averages the gradients. The package is optional and is asked for the division alone: precision, schedules,
batches and files are those of every other run.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.optim.finite import FiniteGate
from library.optim.gradient_norms import GradientNorms
from library.options.groups.distributed import DistributedOptions


def zero_config(options: DistributedOptions, max_grad_norm: float, batch_size: int, num_processes: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Args:
        options: the stage, and where optimizer state is kept.
        max_grad_norm: of all gradients together; 0 for no limit.
        batch_size: of one process; DeepSpeed only checks it.
        num_processes: of the run.
    """
    optimization: dict[str, Any] = {"stage": options.zero_stage}
    if options.offload_optimizer_device is not None:
        optimization["offload_optimizer"] = {"device": options.offload_optimizer_device}
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

        groups = [list(group["params"]) for group in optimizer.param_groups]
        wrapped = accelerator.prepare_model(step, device_placement=False, evaluation_mode=True)  # for mixed precision alone
        engine, inner, _, _ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=config, dist_init_required=False)
        self.accelerator = ZeroAccelerator(accelerator, engine)
        self.step: nn.Module = engine
        self.updater = ZeroUpdater(engine)
        divides = config["zero_optimization"]["stage"] > 0
        self.optimizer = ZeroOptimizer(optimizer, inner, groups) if divides else optimizer


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


class ZeroOptimizer:
    """The optimizer as states see it: with the parameters it was made over, not the shares it steps.

    Args:
        optimizer: whose groups DeepSpeed has given one share of all their parameters each.
        inner: DeepSpeed's own around it.
        parameters: of each group, whole.
    """

    restores_exactly = True

    def __init__(self, optimizer: torch.optim.Optimizer, inner: Any, parameters: Sequence[Sequence[nn.Parameter]]) -> None:
        self.optimizer = optimizer
        self._inner = inner
        self._parameters = parameters
        self._gathered: dict[int, dict[str, Any]] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups as they are now, with whole parameters."""
        groups = zip(self.optimizer.param_groups, self._parameters, strict=True)
        return [{**group, "params": list(parameters)} for group, parameters in groups]

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of a group that says nothing else."""
        return self.optimizer.defaults

    def gather(self) -> None:
        """Gather the state of every parameter in main memory; every process calls it."""
        for number, parameter, share in self._numbered():
            state = self.optimizer.state.get(share, {})
            self._gathered[number] = {key: self._whole(parameter, share, value) for key, value in state.items()}

    def forget(self) -> None:
        """Drop what was gathered."""
        self._gathered.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what was gathered, as the same optimizer in one process would."""
        numbers = iter(range(sum(map(len, self._parameters))))
        groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in self.param_groups]
        return {"state": dict(self._gathered), "param_groups": groups}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take up the state of a run in any number of processes, and the parameters as they are now."""
        for group, told in zip(self.optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in told.items() if key != "params"})
        for number, parameter, share in self._numbered():
            state = self.optimizer.state[share]
            for key, value in saved["state"].get(number, {}).items():
                if getattr(value, "shape", None) != parameter.shape:
                    state[key] = value.clone() if isinstance(value, Tensor) else value
                    continue
                state.setdefault(key, torch.zeros_like(share, dtype=value.dtype))
                self._own(parameter, state[key]).copy_(_fragment(parameter, value))
        self._inner.refresh_fp32_params()

    def _numbered(self) -> Iterator[tuple[int, nn.Parameter, Tensor]]:
        """Yield number and parameter of each that is trained, and the share of its group that this process steps."""
        number = 0
        for group, parameters in zip(self.optimizer.param_groups, self._parameters, strict=True):
            for parameter in parameters:
                if parameter.requires_grad:
                    yield number, parameter, group["params"][0]
                number += 1

    def _whole(self, parameter: nn.Parameter, share: Tensor, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != share.shape:
            return value.detach().cpu() if isinstance(value, Tensor) else value
        whole = torch.zeros_like(parameter, dtype=value.dtype)
        _fragment(parameter, whole).copy_(self._own(parameter, value))
        torch.distributed.all_reduce(whole)  # everybody has another part of it, and zeros elsewhere
        return whole.detach().cpu()

    @staticmethod
    def _own(parameter: nn.Parameter, share: Tensor) -> Tensor:
        """Return the part of a share that belongs to a parameter; it may be empty."""
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return share[:0]
        address = mapping.get_hp_fragment_address()
        return share.narrow(0, address.start, address.numel)


def _fragment(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """Return the part, flat, of a tensor like the parameter that this process steps; it may be empty."""
    mapping = getattr(parameter, "_hp_mapping", None)
    flat = whole.view(-1)
    if mapping is None:
        return flat[:0]
    address = mapping.lp_fragment_address
    return flat.narrow(0, address.start, address.numel)
