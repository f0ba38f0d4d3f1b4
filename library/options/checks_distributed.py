"""What does not go together with a model divided over several processes; nothing here needs torch."""

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec

from library.options.checks_optimizer import class_path, optimizer_name
from library.options.groups.distributed import DistributedOptions, ProcessGroupOptions
from library.options.scripts import SdxlTrainOptions, TrainingOptions

_OF_TORCH = ("AdamW", "Adam", "SGD", "Adagrad", "NAdam", "RAdam", "RMSprop", "Adamax", "Adadelta", "ASGD")
SHARDED_OPTIMIZERS = (*(f"torch.optim.{name}" for name in _OF_TORCH), "lion_pytorch.Lion")
"""Optimizers whose steps are the same on shares of parameters, as tests hold; not Rprop, whose masks shares lack in torch 2.11."""
ZERO_OPTIMIZERS = tuple(path for path in SHARDED_OPTIMIZERS if path != "torch.optim.Adagrad")
"""The same but for the one that DeepSpeed makes anew, which is lost to learning-rate schedules then."""
_OF_DEEPSPEED = {
    name: field for name, field in DistributedOptions.model_fields.items() if name not in ProcessGroupOptions.model_fields
}
_ZERO3_FLAGS = {
    "zero3_init_flag": "models are read from memory-mapped files, a tensor at a time, and divided then",
    "zero3_save_16bit_model": "models are always gathered and saved whole, in the type that --save_precision says",
}
"""Flags of stage 3 that bring nothing here, and why."""


def wants_sharding(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether `accelerate launch` was told to divide the model (FSDP) over more than one process."""
    return environment.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1") and environment.get("WORLD_SIZE", "1") != "1"


def what_divides(distributed: ProcessGroupOptions) -> str | None:
    """Return what divides a run over its processes; None where each has everything."""
    if isinstance(distributed, DistributedOptions) and distributed.deepspeed:
        return "DeepSpeed"
    return "FSDP" if wants_sharding() else None


def distributed_problems(options: TrainingOptions) -> Iterator[str]:
    """Yield what cannot be trained in several processes in the way the launcher was told."""
    if options.distributed.ddp_static_graph and options.length.gradient_accumulation_steps > 1:
        yield (
            "--ddp_static_graph excludes --gradient_accumulation_steps above 1: PyTorch's static graph wants gradients exchanged "
            "after every batch. Leave one of them out."
        )
    if wants_sharding():
        yield from _sharding_problems(options)
    if options.distributed.deepspeed:
        yield from _deepspeed_problems(options, options.distributed)
        yield from _place_problems(options.distributed)
        if options.distributed.zero_stage == 3:
            yield from _divided_weights_problems(options)


def distributed_notes(options: TrainingOptions) -> Iterator[str]:
    """Yield what has no effect in the processes that were asked for."""
    if not options.distributed.deepspeed:
        given = [name for name, value in options.distributed if name in _OF_DEEPSPEED and value != _OF_DEEPSPEED[name].default]
        for name in given:
            yield f"--{name} has no effect without --deepspeed."
        return
    for name in ("ddp_gradient_as_bucket_view", "ddp_static_graph"):
        if getattr(options.distributed, name):
            yield f"--{name} has no effect with --deepspeed."
    for name, why in _ZERO3_FLAGS.items():
        if getattr(options.distributed, name):
            yield f"--{name} has no effect: {why}."


def _deepspeed_problems(options: TrainingOptions, zero: DistributedOptions) -> Iterator[str]:
    if find_spec("deepspeed") is None:
        yield "--deepspeed needs the package deepspeed. Install it with: pip install deepspeed"
    if wants_sharding():
        yield "--deepspeed and accelerate's FSDP exclude each other: both divide the work over the processes. Choose one."
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield "--deepspeed divides the work over processes, and this is the only one. Launch at least two, or leave it out."
    if zero.fp16_master_weights_and_gradients:
        yield (
            "--fp16_master_weights_and_gradients belongs to DeepSpeed's own float16 training with its own Adam: here weights are "
            "kept in float32 and --optimizer_type steps them. Leave it out."
        )
    if options.compile.torch_compile:
        yield "--deepspeed has not been tried with --torch_compile. Leave one of them out."
    if options.optimizer.on_non_finite == "skip":
        yield "--on_non_finite skip leaves out updates, which --deepspeed cannot. Leave one of them out."
    if options.logging.log_grad_norm:
        yield "--log_grad_norm measures whole gradients, which --deepspeed divides over the processes. Leave one of them out."
    precision = options.precision
    if precision.mixed_precision == "fp16" or precision.full_bf16:
        given = "--full_bf16" if precision.full_bf16 else "--mixed_precision fp16"
        yield f"--deepspeed excludes {given}: weights are kept in float32. Use --mixed_precision bf16 or no."
    if class_path(options.optimizer) not in ZERO_OPTIMIZERS:
        yield f"--deepspeed steps shares of parameters, {_not_known(options, ZERO_OPTIMIZERS)}"


def _place_problems(zero: DistributedOptions) -> Iterator[str]:
    """Yield what DeepSpeed cannot keep where it was asked to."""
    if zero.offload_param_device is not None and zero.zero_stage != 3:
        yield "--offload_param_device needs --zero_stage 3: the other stages leave weights whole on the GPU. Leave it out."
    if zero.offload_optimizer_device is not None and zero.zero_stage == 0:
        yield "--offload_optimizer_device needs --zero_stage 1, 2 or 3: stage 0 divides nothing. Leave it out."
    if zero.offload_optimizer_device == "nvme" or zero.offload_optimizer_nvme_path is not None:
        name = "offload_optimizer_device nvme" if zero.offload_optimizer_device == "nvme" else "offload_optimizer_nvme_path"
        why = "DeepSpeed keeps it in main memory all the same" if zero.zero_stage != 3 else "states of a run could not be saved"
        yield f"--{name}: with --zero_stage {zero.zero_stage} {why}. Give --offload_optimizer_device cpu."
    if zero.offload_param_device == "nvme" and zero.offload_param_nvme_path is None:
        yield "--offload_param_device nvme needs --offload_param_nvme_path, a folder on a fast disk."
    if zero.offload_param_nvme_path is not None and zero.offload_param_device != "nvme":
        yield "--offload_param_nvme_path is for --offload_param_device nvme. Leave one of them out, or give both."


def _divided_weights_problems(options: TrainingOptions) -> Iterator[str]:
    """Yield what DeepSpeed's stage 3 excludes."""
    if not isinstance(options, SdxlTrainOptions):
        yield (
            "--zero_stage 3 divides trained weights, which only sdxl_train.py can: here they are small, and act within layers of "
            "the model, where DeepSpeed would not gather them. Give --zero_stage 2, and --fp8_base for the model itself."
        )
    if options.precision.cpu_offload_checkpointing:
        yield (
            "--zero_stage 3 excludes --cpu_offload_checkpointing: DeepSpeed's gathered weights would be taken for activations. "
            "Leave one of them out."
        )


def _not_known(options: TrainingOptions, known: Sequence[str]) -> str:
    names = ", ".join(path.rpartition(".")[2] for path in known)
    return f"and --optimizer_type {optimizer_name(options.optimizer)} is not known to be right on those. Use one of {names}."


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
        yield f"{where}, {_not_known(options, SHARDED_OPTIMIZERS)}"
    if options.ema.ema_decay is not None:
        yield f"{where}, and --ema_decay averages whole weights. Leave it out."
    if options.compile.torch_compile:
        yield f"{where}, with which --torch_compile has not been tried. Leave it out."
    for variable, instead in _SETTINGS.items():
        if os.environ.get(variable, "").lower() in ("true", "1"):
            yield f"{where} with {variable.lower()}: true. {instead}"


_SETTINGS = {
    "FSDP_OFFLOAD_PARAMS": "Set it to false: shares are kept on the GPU. --deepspeed can keep them in main memory.",
    "FSDP_ACTIVATION_CHECKPOINTING": "Set it to false and give --gradient_checkpointing, which is aware of the blocks.",
}
"""Settings of accelerate's configuration that would change nothing, and what to do instead."""
