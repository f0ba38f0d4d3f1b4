"""Forecast the peak memory of a step at its real size, without a GPU and without the memory: traced with fake tensors.

The step is the benchmark's own, made of tensors that have shapes and types but no data. What is not traced is added: the state of
8-bit optimizers, whose kernels want real tensors. AdamW is traced with its fused kernel, which keeps no temporary copies.
"""

from typing import cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from library.memory.pretend import PretendAccelerator
from library.memory.trace import ACTIVATIONS, GRADIENTS, OPTIMIZER, WEIGHTS, Peak, trace_peak
from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import WorkingPrecisionOptions
from library.training.accelerator import DTypes
from library.training.step import TrainStep
from tools.bench_step import make_run, one_step

_MOMENTS_OF_8BIT = {"adamw8bit": 2, "pagedadamw8bit": 2, "lion8bit": 1, "pagedlion8bit": 1, "sgdnesterov8bit": 1}
_SMALLEST_IN_8BIT = 4096
"""bitsandbytes keeps the state of smaller tensors in float32."""
_BLOCK_OF_8BIT = 256
"""Elements that share a float32 scale."""


def forecast(bench: BenchOptions, precision: WorkingPrecisionOptions, optimizer: OptimizerOptions) -> Peak:
    """Return the peak of a training step.

    Args:
        bench: what is trained, at which size.
        precision: number types and checkpointing.
        optimizer: its options; of 8-bit ones the state is computed.
    """
    moments = _MOMENTS_OF_8BIT.get(optimizer.optimizer_type.lower())
    traced = optimizer if moments is None else optimizer.model_copy(update={"optimizer_type": "SGD", "optimizer_args": None})
    device = torch.device("cpu")  # autograd's engine wants streams of any other device; sizes and kernels' results are the same
    compute = DTypes.of(precision, no_half_vae=False, save_precision=None).compute
    with FakeTensorMode(allow_non_fake_inputs=True):
        accelerator = PretendAccelerator(device, None if compute == torch.float32 else compute)
        run, batch = make_run(bench, precision, traced, accelerator)
        inner = run.schedule.optimizer
        for group in inner.param_groups:
            if "fused" in group:
                group["fused"], group["foreach"] = True, False
        modules = [run.trainable.module, cast(TrainStep, run.step).parts.denoiser]
        peak = trace_peak(lambda: one_step(run, batch), modules, inner, device)
        state = 0 if moments is None else sum(eight_bit_state(p.numel(), moments) for g in inner.param_groups for p in g["params"])
    return Peak(peak.total + state, {**peak.parts, OPTIMIZER: peak.parts[OPTIMIZER] + state})


def eight_bit_state(elements: int, moments: int) -> int:
    """Return the bytes of bitsandbytes' block-wise 8-bit state of one tensor (Dettmers et al. 2022).

    Args:
        elements: of the tensor.
        moments: how many the optimizer keeps.
    """
    if elements < _SMALLEST_IN_8BIT:
        return 4 * moments * elements
    return moments * (elements + 4 * -(-elements // _BLOCK_OF_8BIT))


def rows(peak: Peak) -> dict[str, str]:
    """Return the forecast for people: one fact per line."""
    gib = peak.in_gib()
    parts = ", ".join(f"{gib[name]:.2f} {name}" for name in (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS))
    return {"forecast peak": f"{gib['total']:.2f} GiB ({parts}); traced, not measured"}
