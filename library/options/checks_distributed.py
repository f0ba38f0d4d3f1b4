"""What does not go together with a model divided over several processes; nothing here needs torch."""

import os
from collections.abc import Iterator, Mapping

from library.options.checks_optimizer import class_path, optimizer_name
from library.options.scripts import SdxlTrainOptions, TrainingOptions

_OF_TORCH = ("AdamW", "Adam", "SGD", "Adagrad", "NAdam", "RAdam", "RMSprop", "Adamax", "Adadelta", "Rprop", "ASGD")
SHARDED_OPTIMIZERS = (*(f"torch.optim.{name}" for name in _OF_TORCH), "lion_pytorch.Lion")
"""Optimizers whose steps are the same on shares of parameters, as tests hold."""


def wants_sharding(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether `accelerate launch` was told to divide the model (FSDP) over more than one process."""
    return environment.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1") and environment.get("WORLD_SIZE", "1") != "1"


def distributed_problems(options: TrainingOptions) -> Iterator[str]:
    """Yield what cannot be trained in several processes in the way the launcher was told."""
    if options.distributed.ddp_static_graph and options.length.gradient_accumulation_steps > 1:
        yield (
            "--ddp_static_graph excludes --gradient_accumulation_steps above 1: PyTorch's static graph wants gradients exchanged "
            "after every batch. Leave one of them out."
        )
    if wants_sharding():
        yield from _sharding_problems(options)


def _sharding_problems(options: TrainingOptions) -> Iterator[str]:
    where = "accelerate's configuration divides the model over the processes (FSDP)"
    if not isinstance(options, SdxlTrainOptions):
        yield f"{where}, which only sdxl_train.py does: a network is small. Set distributed_type: MULTI_GPU in the configuration."
        return
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        yield f"{where} in version {version}. Set fsdp_version: 2 in it."
    if options.precision.mixed_precision == "fp16":
        yield f"{where}, which excludes --mixed_precision fp16. Use --mixed_precision bf16 or no."
    if options.precision.full_bf16:
        yield f"{where}, which excludes --full_bf16: shares are kept in float32. Leave it out."
    if class_path(options.optimizer) not in SHARDED_OPTIMIZERS:
        names = ", ".join(path.rpartition(".")[2] for path in SHARDED_OPTIMIZERS)
        yield (
            f"{where}, and --optimizer_type {optimizer_name(options.optimizer)} is not known to take right steps on shares of "
            f"parameters. Use one of {names}."
        )
    if options.ema.ema_decay is not None:
        yield f"{where}, and --ema_decay averages whole weights. Leave it out."
    for variable, instead in _SETTINGS.items():
        if os.environ.get(variable, "").lower() in ("true", "1"):
            yield f"{where} with {variable.lower()}: true. {instead}"


_SETTINGS = {
    "FSDP_OFFLOAD_PARAMS": "Set it to false: shares are kept on the GPU. --deepspeed can keep them in main memory.",
    "FSDP_ACTIVATION_CHECKPOINTING": "Set it to false and give --gradient_checkpointing, which is aware of the blocks.",
}
"""Settings of accelerate's configuration that would change nothing, and what to do instead."""
