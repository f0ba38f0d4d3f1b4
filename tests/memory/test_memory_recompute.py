"""Which blocks are computed again first, and how many it takes: what they keep is counted at full size, without data."""

from itertools import pairwise
from typing import cast

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from library.memory.pretend import PretendAccelerator
from library.memory.recompute import fraction_to_save, kept_by_blocks
from library.models.sdxl.unet import UNet
from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from library.training.step import TrainStep
from tools.bench_step import make_run
from tools.bench_trace import forecast

FULL_BF16 = StepPrecisionOptions(mixed_precision="bf16", full_bf16=True)
TINY = BenchOptions(size="tiny", resolution=128, batch_size=2)


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


def test_the_fraction_that_saves_enough_is_the_smallest() -> None:
    assert fraction_to_save([5, 4, 3, 2], 9) == 0.5
    assert fraction_to_save([5, 4, 3, 2], 10) == 0.75
    assert fraction_to_save([5, 4, 3, 2], 15) is None


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
