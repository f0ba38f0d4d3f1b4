"""Forecast the peak memory of a step at its real size, without a GPU and without the memory: traced with fake tensors.

The step is the benchmark's own, made of tensors that have shapes and types but no data. What is not traced is added: the state of
bitsandbytes' optimizers, whose kernels want real tensors. Torch's optimizers step with the kernels that training uses on a GPU.
"""

from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from library.memory.pretend import PretendAccelerator
from library.memory.trace import ACTIVATIONS, GRADIENTS, OPTIMIZER, WEIGHTS, Peak, trace_peak
from library.memory.traceable import ADAFACTOR, KEPT_BY_BITSANDBYTES, kept_bytes
from library.optim.optimizers import choose_kernels
from library.options.checks_optimizer import class_path
from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from library.training.accelerator import DTypes
from library.training.step import TrainStep
from tools.bench_step import make_run, one_step


def forecast(bench: BenchOptions, precision: StepPrecisionOptions, optimizer: OptimizerOptions, device_type: str = "cuda") -> Peak:
    """Return the peak of a training step.

    Args:
        bench: what is trained, at which size.
        precision: number types and checkpointing.
        optimizer: its options, see `library.memory.traceable`.
        device_type: what the step would run on; decides the kernels of torch's optimizers.
    """
    device = torch.device("cpu")  # autograd's engine wants streams of any other device; sizes and kernels' results are the same
    compute = DTypes.of(precision, no_half_vae=False, save_precision=None).compute
    with FakeTensorMode(allow_non_fake_inputs=True):
        accelerator = PretendAccelerator(device, None if compute == torch.float32 else compute)
        run, batch = make_run(bench, precision, what_is_traced(optimizer), accelerator, torch.device("meta"))
        inner = run.schedule.optimizer
        use_kernels_of(inner, device_type)
        modules = [run.trainable.module, cast(TrainStep, run.step).parts.denoiser]
        peak = trace_peak(lambda: one_step(run, batch), modules, inner, device)
        kept = KEPT_BY_BITSANDBYTES.get(class_path(optimizer), (0, 32))
        state = sum(kept_bytes(parameter.numel(), *kept) for group in inner.param_groups for parameter in group["params"])
    return Peak(peak.total + state, {**peak.parts, OPTIMIZER: peak.parts[OPTIMIZER] + state})


def use_kernels_of(optimizer: torch.optim.Optimizer, device_type: str) -> None:
    """Step with the kernels that training would use on a device, where the arguments do not choose others.

    Args:
        optimizer: as `make_optimizer` gives it, on the CPU.
        device_type: "cuda" or "cpu".
    """
    choose_kernels(optimizer, device_type)
    for group in optimizer.param_groups:
        if device_type == "cuda" and group.get("foreach", False) is None and not (group.get("fused") or group["differentiable"]):
            group["foreach"] = True  # torch's choice on a GPU


def what_is_traced(optimizer: OptimizerOptions) -> OptimizerOptions:
    """Return the optimizer that stands for another one in the trace: one that makes tensors of the same sizes, or none."""
    path = class_path(optimizer)
    if path in KEPT_BY_BITSANDBYTES:
        stands_in: dict[str, Any] = {"optimizer_type": "SGD", "optimizer_args": None, "use_8bit_adam": False}
    elif path == ADAFACTOR:
        stands_in = {"optimizer_args": (*(optimizer.optimizer_args or ()), "scale_parameter=False")}
    else:
        return optimizer
    return optimizer.model_copy(update=stands_in)


def rows(peak: Peak) -> dict[str, str]:
    """Return the forecast for people: one fact per line."""
    gib = peak.in_gib()
    parts = ", ".join(f"{gib[name]:.2f} {name}" for name in (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS))
    return {"forecast peak": f"{gib['total']:.2f} GiB ({parts}); traced, not measured"}
