"""Which blocks are computed again first, and what that saves: what they keep is counted, at full size without data."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from library.memory.pretend import PretendAccelerator
from library.models.sdxl.unet import UNet
from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from library.training.step import TrainStep
from tools.bench_step import make_run
from tools.bench_trace import forecast

FULL_BF16 = StepPrecisionOptions(mixed_precision="bf16", full_bf16=True)
TINY = BenchOptions(size="tiny", resolution=128, batch_size=2)


def kept_by_blocks(blocks: Mapping[str, nn.Module], run: Callable[[], object], weights: Iterable[Tensor]) -> dict[str, int]:
    """Return the bytes that each block keeps besides its inputs, which somebody keeps anyway.

    Args:
        blocks: by name, none of them checkpointed.
        run: a forward pass with gradients, with real tensors or under `FakeTensorMode`.
        weights: cost nothing to keep: of the model and of what is attached to it.
    """
    known = {_storage(weight) for weight in weights}
    kept: dict[str, int] = {}
    alive: list[Tensor] = []  # so that no storage gets the number of one that is gone
    with ExitStack() as stack:
        for name, block in blocks.items():
            counter = _Counter(name, known, kept, alive)
            stack.callback(block.register_forward_pre_hook(counter.begin).remove)
            stack.callback(block.register_forward_hook(counter.end).remove)
        run()
    return kept


class _Counter:
    """Counts what is kept between the beginning of a block and its end."""

    def __init__(self, name: str, known: set[int], kept: dict[str, int], alive: list[Tensor]) -> None:
        self._name = name
        self._known = known
        self._kept = kept
        self._alive = alive
        self._hooks: saved_tensors_hooks | None = None

    def begin(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Know the inputs, and see what is kept from here on."""
        self._kept.setdefault(self._name, 0)
        for value in inputs:
            self._known.add(_storage(value))
            self._alive.append(value)
        self._hooks = saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()

    def end(self, block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """See no more."""
        if self._hooks is not None:
            self._hooks.__exit__()

    def _keep(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._known:
            self._known.add(_storage(tensor))
            self._alive.append(tensor)
            self._kept[self._name] += tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number


def test_blocks_that_keep_most_for_their_arithmetic_come_first() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        accelerator = PretendAccelerator(torch.device("cpu"), torch.bfloat16)
        run, batch = make_run(BenchOptions(mode="finetune"), FULL_BF16, OptimizerOptions(), accelerator)
        unet = cast(UNet, cast(TrainStep, run.step).parts.denoiser)
        with FlopCounterMode(display=False) as counter:
            kept = kept_by_blocks(unet.blocks(), lambda: run.step(batch), unet.parameters())
    counts = {
        name.removeprefix("TrainStep.trained.unet."): sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()
    }
    order = unet.blocks_by_cost()
    assert set(order) == set(unet.blocks()) and len(order) == 91
    per_operation = [kept[name] / counts[name] for name in order]
    assert per_operation[0] > 5 * per_operation[-5] > 0
    assert all(later <= earlier for earlier, later in pairwise(per_operation))


def test_what_blocks_keep_is_what_computing_them_again_saves() -> None:
    def peak(**precision: object) -> int:
        return forecast(TINY, StepPrecisionOptions(**precision), OptimizerOptions(optimizer_type="SGD")).total  # type: ignore[arg-type]

    run, batch = make_run(TINY, StepPrecisionOptions(), OptimizerOptions())
    unet, network = cast(UNet, run.step.parts.denoiser), run.trainable.module
    kept = kept_by_blocks(unet.blocks(), lambda: run.step(batch), [*unet.parameters(), *network.parameters()])
    order = unet.blocks_by_cost()
    half = order[: round(0.5 * len(order))]
    saved = peak() - peak(gradient_checkpointing=True, checkpoint_fraction=0.5)
    assert saved == pytest.approx(sum(kept[name] for name in half), rel=0.2)
