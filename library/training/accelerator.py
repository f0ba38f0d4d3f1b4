"""The engine under the loop: one process or many, number types, the seed all processes share."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch import nn

from library.options.errors import UsageError
from library.options.groups.distributed import ProcessGroupOptions
from library.options.groups.precision import WorkingPrecisionOptions

log = logging.getLogger(__name__)

_COMPUTE = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SAVED = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class DTypes:
    """The one place that decides number types."""

    compute: torch.dtype
    """Of the computation and of frozen weights."""
    trained: torch.dtype
    """Of trained weights and their gradients."""
    vae: torch.dtype
    saved: torch.dtype | None
    """Of saved files; None keeps the type of the trained weights."""

    @classmethod
    def of(cls, precision: WorkingPrecisionOptions, no_half_vae: bool, save_precision: str | None) -> "DTypes":
        """Decide from the options."""
        compute = _COMPUTE[precision.mixed_precision]
        is_full_half = precision.full_fp16 or precision.full_bf16
        return cls(
            compute=compute,
            trained=compute if is_full_half else torch.float32,
            vae=torch.float32 if no_half_vae else compute,
            saved=_SAVED[save_precision],
        )


def make_accelerator(precision: WorkingPrecisionOptions, distributed: ProcessGroupOptions) -> Accelerator:
    """Start accelerate in the process layout `accelerate launch` chose.

    Gradients are accumulated by the loop, not by accelerate.

    Raises:
        UsageError: if the device cannot compute in the wanted precision.
    """
    handlers: list[Any] = [
        DistributedDataParallelKwargs(
            gradient_as_bucket_view=distributed.ddp_gradient_as_bucket_view,
            static_graph=distributed.ddp_static_graph,
        ),
        # Every weight is used once in a forward pass: casts that are kept until its end would only hold memory.
        AutocastKwargs(cache_enabled=False),
    ]
    if distributed.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=distributed.ddp_timeout)))
    if precision.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UsageError(["--mixed_precision fp16 needs a GPU, and none is visible to PyTorch; use bf16 or no."])
    # Told so, accelerate joins several processes on CPUs too; left to itself it takes each for the only one.
    has_no_device = not torch.accelerator.is_available()
    with _dividing_is_ours():
        # Blocks are compiled by `library.training.compiling` where that is asked for, never the whole step by accelerate.
        return Accelerator(
            mixed_precision=precision.mixed_precision, cpu=has_no_device, dynamo_backend="no", kwargs_handlers=handlers
        )


@contextmanager
def _dividing_is_ours() -> Iterator[None]:
    """Keep accelerate from dividing parameters itself: `sharding` and `zero` do, where the step hides the model from it."""
    told = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    kept = {name: os.environ.pop(name) for name in told if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def prepare(
    accelerator: Accelerator, step: nn.Module, optimizer: torch.optim.Optimizer, *, may_skip: bool, is_divided: bool
) -> tuple[nn.Module, Any]:
    """Wrap the step and the optimizer for mixed precision and several processes.

    Args:
        accelerator: of the run.
        step: its forward is what is wrapped.
        optimizer: over the step's parameters.
        may_skip: whether a batch may leave parameters without a gradient.
        is_divided: whether the parameters are shares, whose gradients are exchanged by the modules themselves.
    """
    if is_divided:
        return accelerator.prepare_model(step, device_placement=False, evaluation_mode=True), accelerator.prepare_optimizer(
            optimizer
        )
    if accelerator.ddp_handler is not None:
        accelerator.ddp_handler.find_unused_parameters = may_skip
    prepared_step, prepared = accelerator.prepare(step, optimizer)
    return prepared_step, prepared


def shared_seed(accelerator: Accelerator, *wanted: int | None) -> int:
    """Return the first seed given, or draw one; every process gets the same."""
    given = next((seed for seed in wanted if seed is not None), None)
    box = [given if given is not None else secrets.randbits(32)]
    broadcast_object_list(box)
    if given is None and accelerator.is_main_process:
        log.info("No --seed given; this run uses seed %d", box[0])
    return int(box[0])
