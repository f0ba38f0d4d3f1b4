"""What a run does and says when a loss or a gradient is not finite."""

import logging
import shlex
from typing import NoReturn

import torch
from accelerate.utils import broadcast_object_list, gather_object

from library.optim.finite import FiniteGate
from library.options.checks_optimizer import begins_uncorrected, optimizer_name
from library.options.errors import UserError
from library.options.scripts import TrainingOptions
from library.training.loop import TrainingRun
from library.training.non_finite import MOST_IN_A_ROW, FiniteGuard, Spoiled
from library.training.position import Position
from library.training.resume_command import resume_command
from library.training.saving import Saver
from library.training.setting import Setting, Trained
from library.training.spoiled import examine, spoiled_weight

log = logging.getLogger(__name__)

_MOST_EXAMINED = 3
"""Updates that are left out of which each is run again; of later ones only the step is told."""


class NotFiniteError(UserError):
    """A loss or gradient was not finite; every process finds it at the same place."""

    is_found_by_all = True


def add_guard(run: TrainingRun, saver: Saver, setting: Setting, trained: Trained, optimizer: torch.optim.Optimizer) -> None:
    """Have a run keep what is not finite from its weights, and stop or go on without it as `--on_non_finite` says.

    Args:
        run: gains the guard, ahead of its observers.
        saver: saves the last good weights.
        setting: of the run.
        trained: what is trained.
        optimizer: as `make_optimizer` gives it.
    """
    stops = setting.options.optimizer.on_non_finite == "stop"
    gate = run.updater.gate = FiniteGate(optimizer, stays_shut=stops)
    response = Response(run, saver, setting, looks_at_gradients=not trained.is_divided)
    guard = FiniteGuard(
        gate,
        run.schedule,
        lambda: saver.live.optimizer.param_groups,
        setting.accelerator.device,
        stops=stops,
        scales=setting.accelerator.scaler is not None,
        must_know=lambda position: saver.plan.should_save_step(position.update),
        tell=response.tell,
        end=response.end,
    )
    run.guard = guard
    run.observers = [guard, *run.observers]


class Response:
    """Tells of updates that were not finite, and ends the run.

    Args:
        run, saver, setting: see `add_guard`.
        looks_at_gradients: whether a process can compute whole gradients by itself.
    """

    def __init__(self, run: TrainingRun, saver: Saver, setting: Setting, *, looks_at_gradients: bool) -> None:
        self._run = run
        self._saver = saver
        self._setting = setting
        self._looks_at_gradients = looks_at_gradients
        self._num_told = 0

    def tell(self, spoiled: Spoiled) -> None:
        """Tell of an update that was left out."""
        self._num_told += 1
        lines = [f"{self._what(spoiled)} That update was left out; training goes on."]
        if self._num_told <= _MOST_EXAMINED:
            lines += self._examined(spoiled)
        if self._num_told == _MOST_EXAMINED:
            lines.append("Of later ones only the step is told.")
        log.warning("%s", "\n".join(lines))

    def end(self, spoiled: Spoiled, last_good: Position) -> NoReturn:
        """Save the last good weights and say what happened.

        Args:
            spoiled: the update.
            last_good: the place that weights and state belong to.

        Raises:
            NotFiniteError: always.
        """
        in_a_row = f"It was the {MOST_IN_A_ROW}th update in a row that could not be made; the run ends."
        head = self._what(spoiled) if self._stops and not spoiled.overflowed else f"{self._what(spoiled)} {in_a_row}"
        lines = [head, *self._examined(spoiled), *self._advice(spoiled), *self._saved(last_good)]
        raise NotFiniteError("\n".join(lines))

    @property
    def _stops(self) -> bool:
        return self._setting.options.optimizer.on_non_finite == "stop"

    def _what(self, spoiled: Spoiled) -> str:
        step = spoiled.before.update + 1
        finite = all(gather_object([bool(torch.tensor(list(spoiled.losses)).isfinite().all())]))
        what = "The gradient of step %d is not finite, though its loss is." if finite else "The loss of step %d is not finite."
        return what % step

    def _examined(self, spoiled: Spoiled) -> list[str]:
        """Return what all processes found, each line once."""
        found: list[str] = gather_object(examine(self._run, spoiled, with_gradients=self._looks_at_gradients))
        dtypes = self._setting.dtypes
        types = [f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in
                 (("computation", dtypes.compute), ("trained weights", dtypes.trained), ("VAE", dtypes.vae))]  # fmt: skip
        return [*dict.fromkeys(found), f"  types: {', '.join(types)}"]

    def _advice(self, spoiled: Spoiled) -> list[str]:
        return ["What to try, one after the other:", *(f"  - {each}" for each in advice(self._setting.options))]

    def _saved(self, last_good: Position) -> list[str]:
        """Save what is good and not saved yet, and say how to go on from there."""
        spoiled = next((name for name in gather_object([spoiled_weight(self._saver.live.module)]) if name), None)
        if spoiled is not None:
            return [
                f"The trained weights themselves are not finite any more ({spoiled}): an earlier update was too large. Nothing was "
                "saved; go on from an earlier state, or start again with a lower rate."
            ]
        if last_good.update == 0:
            return ["No update had been made, so there is nothing to save."]
        for extra in self._saver.live.extras.values():
            extra.go_back(last_good)
        state = self._saver.plan.state_path("step", last_good.update)
        box = [state.exists()]
        broadcast_object_list(box)
        if not box[0]:
            state = self._saver.save_interrupted(last_good)
        command = resume_command(type(self._setting.options), state, self._setting.accelerator.num_processes)
        return [
            f"The weights before it, of step {last_good.update}, are finite and saved. To go on from there, add what helps:",
            f"  {shlex.join(command)}",
        ]


def advice(options: TrainingOptions) -> list[str]:
    """Return what may help against losses and gradients that are not finite, most likely first."""
    precision, tried = options.precision, []
    if not precision.no_half_vae and precision.mixed_precision != "no":
        tried.append("--no_half_vae, if the first module is the VAE's or latents are cached: SDXL's own VAE overflows in float16")
    if precision.mixed_precision == "fp16":
        tried.append("--mixed_precision bf16 instead of fp16, whose largest number is 65504")
    if begins_uncorrected(options.optimizer):
        name = optimizer_name(options.optimizer)
        tried.append(f"--optimizer_args use_bias_correction=True, without which {name} begins with steps that are too long")
    tried.append(f"a lower --learning_rate than {options.optimizer.learning_rate:g}, with --lr_warmup_steps")
    if options.optimizer.max_grad_norm == 0:
        tried.append("--max_grad_norm 1, which limits gradients")
    if options.loss.min_snr_gamma is None:
        tried.append("--min_snr_gamma 5, which keeps single timesteps from outweighing all others")
    tried.append("look at the images above: a damaged file, a wrong mask, or a cache with values that are not finite")
    if options.optimizer.on_non_finite == "stop":
        tried.append("--on_non_finite skip, which leaves such updates out, if it is a single image")
    return tried
