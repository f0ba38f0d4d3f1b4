"""How gradients become an update: all parameters together after the backward pass, or each as soon as its gradient is there."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from library.optim.finite import FiniteGate
from library.optim.gradient_norms import GradientNorms
from library.optim.host_states import HOST, HostStates
from library.optim.parameter_steps import ParameterSteps
from library.options.checks_optimizer import steps_alone
from library.options.errors import UserError
from library.options.groups.optimizer import OptimizerOptions

logger = logging.getLogger(__name__)

_CHUNK = 16 * 2**20
"""Elements whose float32 copies exist at a time while bfloat16 weights are stepped, 64 MiB each of weights and gradients; and whose
state is on the device at a time where it lies in main memory, 128 MiB for AdamW."""


class Updater(Protocol):
    """Makes the updates of a run. One is begun before the backward pass of its last batch and finished after it."""

    gradient_norms: GradientNorms | None
    """Measures the gradients before they are limited, where somebody wants to know."""
    gate: FiniteGate | None
    """Keeps what is not finite from the weights; a gradient scaler has done so already where there is one."""
    before_step: Callable[[], None]
    """Called when all gradients are there and limited, before they are used; never where they are used one by one."""

    def begin(self, seed: int) -> None:
        """Prepare for an update; `seed` decides all that is drawn in it."""

    def finish(self) -> bool:
        """Step what has not been stepped yet and drop all gradients; False where a float16 overflow made the update void."""


class UpdateAfterBackward:
    """Clips the gradient of all parameters together and steps them.

    Args:
        accelerator: `accelerate.Accelerator`; knows of float16 gradients that are scaled.
        prepared: the optimizer as accelerate wraps it.
        parameters: everything that is trained.
        max_grad_norm: of all gradients together; 0 for no limit.
        step: steps the parameters, given the update's seed.
    """

    def __init__(
        self,
        accelerator: Any,
        prepared: Any,
        parameters: Sequence[nn.Parameter],
        max_grad_norm: float,
        step: Callable[[int], None],
    ) -> None:
        self._accelerator = accelerator
        self._prepared = prepared
        self._parameters = list(parameters)
        self._max_grad_norm = max_grad_norm
        self._step = step
        self._seed = 0
        self.gradient_norms: GradientNorms | None = None
        self.gate: FiniteGate | None = None
        self.before_step: Callable[[], None] = lambda: None

    def begin(self, seed: int) -> None:
        """Remember the seed."""
        self._seed = seed

    def finish(self) -> bool:
        """Clip, step, and drop the gradients."""
        if self.gradient_norms is not None:
            scaler = self._accelerator.scaler
            self.gradient_norms.add(self._parameters, None if scaler is None else scaler._scale)
        norm: Tensor | None = None
        if self._max_grad_norm > 0:
            norm = self._accelerator.clip_grad_norm_(self._parameters, self._max_grad_norm)
        self.before_step()
        if self.gate is None or self._accelerator.scaler is not None or self.gate.admits(self._parameters, norm):
            self._step(self._seed)
        was_made = not self._accelerator.optimizer_step_was_skipped
        self._prepared.zero_grad(set_to_none=True)
        return was_made


class UpdateInBackward:
    """Steps groups of parameters inside the backward pass, each when its last gradient has arrived, and drops their gradients.

    So the gradients of one group exist at a time instead of all. The norm is limited for each tensor by itself, since the norm of
    all gradients together is known only when most of them are gone.

    Args:
        steps: of the optimizer.
        groups: every trained parameter once, in the groups that are stepped together.
        max_grad_norm: of each tensor's gradient; 0 for no limit.
    """

    def __init__(self, steps: ParameterSteps, groups: Sequence[Sequence[nn.Parameter]], max_grad_norm: float) -> None:
        self.steps = steps
        self._groups = [list(group) for group in groups]
        self._max_grad_norm = max_grad_norm
        self._seed = 0
        self.gradient_norms: GradientNorms | None = None
        self.gate: FiniteGate | None = None
        self.before_step: Callable[[], None] = lambda: None
        self._arrived = [0] * len(self._groups)
        for number, group in enumerate(self._groups):
            for parameter in group:
                parameter.register_post_accumulate_grad_hook(self._hook_of(number))

    def begin(self, seed: int) -> None:
        """Remember the seed."""
        self._seed = seed

    def finish(self) -> bool:
        """Step the groups of which some parameters had no part in the loss."""
        for number, arrived in enumerate(self._arrived):
            if arrived:
                self._step(number)
        return True

    def _hook_of(self, number: int) -> Callable[[Tensor], None]:
        def gradient_arrived(parameter: Tensor) -> None:
            if self.gradient_norms is not None:
                self.gradient_norms.add([cast(nn.Parameter, parameter)])
            if self._max_grad_norm > 0:
                nn.utils.clip_grad_norm_(parameter, self._max_grad_norm)
            self._arrived[number] += 1
            if self._arrived[number] == len(self._groups[number]):
                self._step(number)

        return gradient_arrived

    def _step(self, number: int) -> None:
        self._arrived[number] = 0
        for chunk in chunked([parameter for parameter in self._groups[number] if parameter.grad is not None], _CHUNK):
            if self.gate is None or self.gate.admits(chunk):
                self.steps.step(chunk, self._seed)
            for parameter in chunk:
                parameter.grad = None


def make_updater(
    optimizer: torch.optim.Optimizer,
    prepared: Any,
    parameters: Sequence[nn.Parameter],
    options: OptimizerOptions,
    accelerator: Any,
) -> Updater:
    """Make the updater that was asked for.

    Args:
        optimizer: as `make_optimizer` gives it.
        prepared: the same as accelerate wraps it.
        parameters: everything that is trained, in the order of the optimizer's groups.
        options: `--fused_backward_pass`, `--fused_optimizer_groups`, `--max_grad_norm`, `--optimizer_states`.
        accelerator: `accelerate.Accelerator`, or what acts like it and says with `host` what stands for main memory.

    Raises:
        UserError: parameters are to be stepped inside the backward pass in more than one process.
    """
    on_host = options.optimizer_states == "host"
    if on_host:
        keep_states(optimizer, accelerator.device, getattr(accelerator, "host", HOST))
    steps = ParameterSteps(optimizer)
    groups = fused_groups(optimizer.param_groups, options)
    if groups is not None:
        if accelerator.num_processes > 1:
            raise UserError(
                "--fused_backward_pass and --fused_optimizer_groups step a parameter before the processes have exchanged its "
                "gradient, so the processes would drift apart. Train in one process, or leave the option out."
            )
        if options.max_grad_norm > 0:
            logger.info(
                "--max_grad_norm %g limits each tensor's gradient by itself, since tensors are stepped in the backward pass.",
                options.max_grad_norm,
            )
        return UpdateInBackward(steps, groups, options.max_grad_norm)
    if accelerator.scaler is not None and any(parameter.dtype == torch.float16 for parameter in parameters):
        accept_half_gradients(accelerator.scaler)
    has_halves = any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    chunks = chunked(parameters, _CHUNK) if steps_alone(options) else [list(parameters)]

    def step_rounding(seed: int) -> None:
        for chunk in chunks:
            steps.step(chunk, seed)

    step = step_rounding if has_halves or on_host else lambda seed: prepared.step()
    return UpdateAfterBackward(accelerator, prepared, parameters, options.max_grad_norm, step)


def keep_states(optimizer: torch.optim.Optimizer, device: torch.device, host: torch.device) -> None:
    """Keep an optimizer's state in main memory, where that is not what it is trained in."""
    if device == host:
        logger.info("--optimizer_states host: training runs in main memory, so the optimizer's state is there already.")
    else:
        HostStates(optimizer, host)


def fused_groups(param_groups: Sequence[dict[str, Any]], options: OptimizerOptions) -> list[list[nn.Parameter]] | None:
    """Return the parameters that are stepped together inside the backward pass, or None where all are stepped after it.

    `--fused_optimizer_groups` cuts the parameters in order into groups of ⌈number / n⌉; another learning rate also begins a group.
    """
    if options.fused_backward_pass:
        return [[parameter] for group in param_groups for parameter in group["params"]]
    if options.fused_optimizer_groups is None:
        return None
    number = sum(len(group["params"]) for group in param_groups)
    size = -(-number // options.fused_optimizer_groups)
    cut: list[list[nn.Parameter]] = []
    rate = object()
    for group in param_groups:
        for parameter in group["params"]:
            if group.get("lr") != rate or len(cut[-1]) == size:
                cut.append([])
                rate = group.get("lr")
            cut[-1].append(parameter)
    return cut


def chunked(parameters: Sequence[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """Cut parameters in order into chunks of at most `most` elements; a larger parameter is a chunk of its own."""
    chunks: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if not chunks or parameter.numel() > room:
            chunks.append([])
            room = most
        chunks[-1].append(parameter)
        room -= parameter.numel()
    return chunks


def accept_half_gradients(scaler: torch.amp.GradScaler) -> None:
    """Let a gradient scaler unscale float16 gradients, which it refuses by default since they are usually a mistake.

    With float16 weights (`--full_fp16`) there are no others; values that overflow when unscaled make the update void as always.
    """
    unscale = scaler._unscale_grads_

    def unscale_any(optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> dict[torch.device, Tensor]:
        return unscale(optimizer, inv_scale, found_inf, True)

    scaler._unscale_grads_ = unscale_any  # type: ignore[method-assign]
