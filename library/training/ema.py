"""An exponential moving average of the trained weights, kept in float32 beside the run and saved beside each model.

Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; its use for diffusion models: Karras et al. 2023,
"Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from library.memory.block_swap import wait_for_swapping
from library.optim.updates import chunked
from library.training.position import Position
from library.training.saving import Saver
from library.training.setting import Setting, Trained

_CHUNK = 64 * 2**20
"""Elements whose float32 copies exist at a time while weights of another type are averaged: a quarter of a GiB."""


def decay_after(update: int, decay: float) -> float:
    """Return the share of the average that stays at an update: min(decay, (1 + n)/(10 + n)).

    So the average follows closely at first, and forgets the weights that training began with.

    Args:
        update: n, updates made, this one included.
        decay: the largest share.
    """
    return min(decay, (1 + update) / (10 + update))


class MovingAverage:
    """The observer that averages; it comes before those that save.

    Nothing waits for the device in a step. For an average in main memory the weights are copied there in the GPU's turn, and taken
    in by a thread while the next step runs.

    Args:
        module: holds every trained parameter; the average begins with what they are now.
        decay: share of the average that stays at each update; less in the beginning, see `decay_after`.
        in_main_memory: keep the average in main memory; False: on the device of each parameter.
    """

    def __init__(self, module: nn.Module, decay: float, *, in_main_memory: bool) -> None:
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._module = module
        self._decay = decay
        ends = list(itertools.accumulate(len(chunk) for chunk in chunked(self._parameters, _CHUNK)))
        self._parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        self._average = [
            parameter.detach().to("cpu" if in_main_memory else parameter.device, torch.float32, copy=True)
            for parameter in self._parameters
        ]
        self._staged = (
            [torch.empty_like(p, device="cpu", pin_memory=True) for p in self._parameters]
            if in_main_memory and all(p.device.type == "cuda" for p in self._parameters)
            else None
        )
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self._pending: Future[None] | None = None
        self._update = 0

    def before_training(self, position: Position) -> None:
        """The average begins with the weights the run begins with, or with that of the resumed state."""
        self._update = position.update

    def after_update(self, position: Position) -> None:
        """Move the average towards the weights."""
        self._update = position.update
        share = 1 - decay_after(position.update, self._decay)
        wait_for_swapping(self._module)
        weights = [parameter.detach() for parameter in self._parameters]
        if self._staged is None:
            self._move(weights, share)
            return
        self.finish()  # done long ago, since a whole step has passed
        for staged, weight in zip(self._staged, weights, strict=True):
            staged.copy_(weight, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending = self._worker.submit(self._move_on_arrival, arrived, self._staged, share)

    def after_epoch(self, position: Position) -> None:
        """Only updates count."""

    def after_training(self, position: Position) -> None:
        """The average is saved with the model."""

    def finish(self) -> None:
        """Wait until the average has taken in the last update."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the average, float32, by the names of the parameters."""
        self.finish()
        return dict(zip(self._names, self._average, strict=True))

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from an average that was saved."""
        self.finish()
        for name, average in zip(self._names, self._average, strict=True):
            average.copy_(tensors[name])

    @torch.no_grad()
    def go_back(self, position: Position) -> None:
        """Undo the updates after a place at which the weights are still, to the rounding of float32.

        Each has moved the average a share s of the way to the same weights w: with a' = a + s(w − a) for one after the other,
        a' − w is (a − w)·∏(1 − s).
        """
        left = math.prod(decay_after(update, self._decay) for update in range(position.update + 1, self._update + 1))
        self._update = position.update
        if left == 1:
            return
        self.finish()
        wait_for_swapping(self._module)
        for average, parameter in zip(self._average, self._parameters, strict=True):
            weight = parameter.to(average.device, torch.float64)
            average.copy_(weight + (average - weight) / left)

    @contextlib.contextmanager
    def in_place_of_weights(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Let the module hold the average while a model is saved, and then its own weights again, not a bit of them changed.

        Args:
            dtype: of the saved model; None: the average is rounded once, to the type of the weights.
        """
        self.finish()
        weights = [parameter.data for parameter in self._parameters]
        try:
            for parameter, average in zip(self._parameters, self._average, strict=True):
                is_kept = dtype is not None or parameter.dtype == average.dtype
                parameter.data = average if is_kept else average.to("cpu", parameter.dtype)
            yield
        finally:
            for parameter, weight in zip(self._parameters, weights, strict=True):
                parameter.data = weight

    def _move_on_arrival(self, arrived: torch.cuda.Event, weights: Sequence[Tensor], share: float) -> None:
        arrived.synchronize()
        self._move(weights, share)

    @torch.no_grad()
    def _move(self, weights: Sequence[Tensor], share: float) -> None:
        for part in self._parts:
            average = self._average[part]
            near = [weight.to(kept.device, torch.float32) for weight, kept in zip(weights[part], average, strict=True)]
            torch._foreach_lerp_(average, near, share)


def moving_average(setting: Setting, trained: Trained, saver: Saver) -> list[MovingAverage]:
    """Return the observer that averages the weights, or nothing where none is wanted; the process that saves has one.

    Args:
        setting: of the run.
        trained: what is averaged.
        saver: gains the average, for models and states.
    """
    options = setting.options.ema
    if options.ema_decay is None or not setting.accelerator.is_main_process:
        return []
    average = MovingAverage(trained.trainable.module, options.ema_decay, in_main_memory=options.ema_device == "cpu")
    saver.live.extras["ema"] = average
    saver.variants["-ema"] = average.in_place_of_weights
    return [average]
