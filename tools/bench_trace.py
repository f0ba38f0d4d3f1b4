"""Forecast the peak memory of a step at its real size, without a GPU and without the memory: traced with fake tensors.

The step is the benchmark's own, made of tensors that have shapes and types but no data. What is not traced is added: the state of
bitsandbytes' optimizers, whose kernels want real tensors. Torch's optimizers step with the kernels that training uses on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch

from library.dataset.batch import Batch
from library.memory.pretend import PretendAccelerator, fake_tensors
from library.memory.trace import ACTIVATIONS, GRADIENTS, OPTIMIZER, WEIGHTS, Peak, StorageCounter, make_state, trace_peak, with_more
from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from library.training.accelerator import DTypes
from library.training.loop import TrainingRun, one_step
from library.training.stand_ins import computed_state, step_each_kind_once, trained_parameters, use_kernels_of, what_is_traced
from library.training.step import TrainStep
from tools.bench_step import make_run


@contextmanager
def traced_run(
    bench: BenchOptions, precision: StepPrecisionOptions, optimizer: OptimizerOptions, device_type: str = "cuda"
) -> Iterator[tuple[TrainingRun, Batch]]:
    """Give the benchmark's run and its batch, made of fake tensors; their steps are made inside the block.

    Args:
        bench: what is trained, at which size.
        precision: number types and checkpointing.
        optimizer: its options, see `library.memory.traceable`.
        device_type: what the step would run on; decides the kernels of torch's optimizers.
    """
    device = torch.device("cpu")  # autograd's engine wants streams of any other device; sizes and kernels' results are the same
    compute = DTypes.of(precision, no_half_vae=False, save_precision=None).compute
    with fake_tensors():
        accelerator = PretendAccelerator(device, None if compute == torch.float32 else compute)
        run, batch = make_run(bench, precision, what_is_traced(optimizer), accelerator, torch.device("meta"))
        use_kernels_of(run.schedule.optimizer, device_type)
        make_state(run.schedule.optimizer, run.updater.finish)
        yield run, batch


def forecast(bench: BenchOptions, precision: StepPrecisionOptions, optimizer: OptimizerOptions, device_type: str = "cuda") -> Peak:
    """Return the peak of a training step; see `traced_run`."""
    with traced_run(bench, precision, optimizer, device_type) as (run, batch):
        inner = run.schedule.optimizer
        modules = [run.trainable.module, cast(TrainStep, run.step).parts.denoiser]
        counter = StorageCounter(run.accelerator.device)
        step_each_kind_once(run.updater, counter)
        peak = trace_peak(lambda: one_step(run, batch), modules, inner, run.accelerator.device, counter=counter)
    return with_more(peak, OPTIMIZER, computed_state(optimizer, trained_parameters(inner)))


def rows(peak: Peak) -> dict[str, str]:
    """Return the forecast for people: one fact per line."""
    gib = peak.in_gib()
    parts = ", ".join(f"{gib[name]:.2f} {name}" for name in (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS))
    return {"forecast peak": f"{gib['total']:.2f} GiB ({parts}); traced, not measured"}
