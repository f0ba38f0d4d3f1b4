"""Combinations of options that exclude each other, and those that are only odd; nothing here needs torch."""

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from library.options.checks_compile import compile_problems
from library.options.checks_distributed import distributed_notes, distributed_problems, what_divides
from library.options.checks_generation import generation_notes, generation_problems
from library.options.checks_hub import hub_notes, hub_problems
from library.options.checks_objective import objective_notes, objective_problems
from library.options.checks_optimizer import fused_problems, host_state_problems, is_schedule_free
from library.options.checks_swap import swap_problems
from library.options.checks_trained import trained_notes, trained_problems
from library.options.dataset_class import class_notes, class_problems
from library.options.groups.dataset import DatasetOptions
from library.options.groups.logging import LoggingOptions
from library.options.groups.model import ModelOptions
from library.options.groups.precision import StepPrecisionOptions, WorkingPrecisionOptions
from library.options.groups.sample import SampleOptions
from library.options.idle import idle_notes
from library.options.scripts import (
    CacheLatentsOptions,
    CacheTextEncoderOutputsOptions,
    ScriptOptions,
    SdxlGenImgOptions,
    TrainingOptions,
)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?<!\.safetensors)(?<!\.ckpt)(?<!\.pt)(?<!\.bin)")
"""`owner/model` on the Hugging Face hub; what ends like a file is meant to be one."""


def find_problems(options: ScriptOptions) -> list[str]:
    """Return one sentence for everything that keeps these options from being used together."""
    match options:
        case TrainingOptions():
            return [*_training_problems(options), *trained_problems(options)]
        case CacheLatentsOptions() | CacheTextEncoderOutputsOptions():
            return [*_model_problems(options.model), *_source_problems(options.dataset), *_tool_problems(options.dataset)]
        case SdxlGenImgOptions():
            return list(generation_problems(options))
    return []


def find_notes(options: ScriptOptions) -> list[str]:
    """Return one sentence for everything that is odd but can be done."""
    match options:
        case TrainingOptions():
            return [*_training_notes(options), *trained_notes(options)]
        case SdxlGenImgOptions():
            return list(generation_notes(options))
    return []


def _training_problems(options: TrainingOptions) -> Iterator[str]:
    yield from _model_problems(options.model)
    yield from _source_problems(options.dataset)
    yield from class_problems(options)
    if options.output.output_dir is None:
        yield "--output_dir is missing. Name the folder for what is trained."
    yield from precision_problems(options.precision)
    yield from checkpoint_problems(options.precision)
    yield from swap_problems(options.precision)
    yield from quant_problems(options.precision)
    yield from compile_problems(options.compile)
    yield from fused_problems(options.optimizer, options.length.gradient_accumulation_steps, options.precision.mixed_precision)
    is_divided = what_divides(options.distributed) is not None
    yield from host_state_problems(options.optimizer, options.precision.mixed_precision, is_divided=is_divided)
    yield from _ema_problems(options)
    yield from objective_problems(options.noise, options.loss, options.model.v_parameterization)
    yield from _sample_problems(options.sample)
    yield from _logging_problems(options.logging)
    yield from _start_problems(options)
    yield from hub_problems(options.state, options.hub)
    yield from distributed_problems(options)
    cache = options.cache
    if cache.cache_latents_posterior and not cache.cache_latents:
        yield "--cache_latents_posterior needs --cache_latents or --cache_latents_to_disk."
    if options.dataset.persistent_data_loader_workers and options.dataset.max_data_loader_n_workers == 0:
        yield "--persistent_data_loader_workers needs workers, but --max_data_loader_n_workers is 0. Leave one of them out."


def precision_problems(precision: WorkingPrecisionOptions) -> Iterator[str]:
    """Yield what cannot be computed in the wanted number types, or with the wanted attention."""
    for name, half in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if getattr(precision, name) and precision.mixed_precision != half:
            yield f"--{name} keeps weights in the type of the computation, so it needs --mixed_precision {half}."
    if precision.wants_xformers and find_spec("xformers") is None:
        name = "xformers" if precision.xformers else "diffusers_xformers"
        yield f"--{name} needs the package xformers: pip install xformers, or leave it out, since PyTorch's attention is as fast."


def checkpoint_problems(precision: StepPrecisionOptions) -> Iterator[str]:
    """Yield why there is nothing to share out among blocks, or to keep in main memory."""
    if precision.checkpoint_fraction != 1 and not precision.gradient_checkpointing:
        yield (
            f"--checkpoint_fraction {precision.checkpoint_fraction:g} says how many blocks are computed again, so it needs "
            "--gradient_checkpointing."
        )
    if precision.cpu_offload_checkpointing and not precision.gradient_checkpointing:
        yield (
            "--cpu_offload_checkpointing keeps checkpointed activations in main memory, so it needs --gradient_checkpointing, "
            "without which there are many times more of them."
        )


def quant_problems(precision: StepPrecisionOptions) -> Iterator[str]:
    """Yield why frozen weights cannot be held in the wanted number of bits."""
    quant = precision.base_quant
    if quant not in (None, "fp8"):
        for name in ("fp8_base", "fp8_base_unet"):
            if getattr(precision, name, False):
                yield f"--{name} and --base_quant {quant} hold the same weights in two ways. Choose one."
        if find_spec("bitsandbytes") is None:
            yield f"--base_quant {quant} needs the package bitsandbytes: pip install bitsandbytes, or use --base_quant fp8."


def _model_problems(model: ModelOptions) -> Iterator[str]:
    if model.pretrained_model_name_or_path is None:
        yield "--pretrained_model_name_or_path is missing. Name an SDXL checkpoint file or a diffusers folder."
    for name, path in (("pretrained_model_name_or_path", model.pretrained_model_name_or_path), ("vae", model.vae)):
        if path is not None and not Path(path).exists() and not _HUB_NAME.fullmatch(path):
            yield f"--{name}: there is no file or folder {path}."
    folder = model.tokenizer_cache_dir
    if folder is not None and os.path.exists(folder) and not (os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK)):
        yield f"--tokenizer_cache_dir: {folder} is not a folder that can be read. Leave it out: it is not needed."
    if model.v2:
        yield "--v2 is for Stable Diffusion 2.x, but this script is for SDXL. Leave it out."


def _source_problems(dataset: DatasetOptions) -> Iterator[str]:
    if not dataset.dataset_config and not dataset.train_data_dir and dataset.dataset_class is None:
        yield "There are no training images. Give --dataset_config, or --train_data_dir with folders <repeats>_<class tokens>."


def _tool_problems(dataset: DatasetOptions) -> Iterator[str]:
    if dataset.dataset_class is not None:
        yield "--dataset_class makes its batches itself, so there is nothing to cache beside images. Leave it out."


def _ema_problems(options: TrainingOptions) -> Iterator[str]:
    if options.ema.ema_decay is None:
        if options.ema.ema_device != "cpu":
            yield "--ema_device is for the average of the weights, so it needs --ema_decay, for example 0.999."
    elif is_schedule_free(options.optimizer):
        yield "--ema_decay averages the weights, as schedule-free optimizers do themselves. Leave one of them out."
    elif options.distributed.deepspeed:
        yield "--ema_decay averages whole weights, but --deepspeed may divide them over the processes. Leave one of them out."


def _sample_problems(sample: SampleOptions) -> Iterator[str]:
    wanted = sample.sample_at_first or max(sample.sample_every_n_steps or 0, sample.sample_every_n_epochs or 0) > 0
    if wanted and sample.sample_prompts is None:
        yield "Sample images need --sample_prompts, a file with prompts (.txt, .toml or .json)."
    if sample.sample_prompts is not None and not Path(sample.sample_prompts).is_file():
        yield f"--sample_prompts: there is no file {sample.sample_prompts}."


def _logging_problems(log: LoggingOptions) -> Iterator[str]:
    if log.log_with in ("tensorboard", "all") and log.logging_dir is None:
        yield f"--log_with {log.log_with} needs --logging_dir, the folder for the logs."
    if log.log_with in ("wandb", "all") and find_spec("wandb") is None:
        yield f"--log_with {log.log_with} needs the wandb package. Install it with: pip install wandb"


def _start_problems(options: TrainingOptions) -> Iterator[str]:
    state, length = options.state, options.length
    if state.initial_step is not None and length.max_train_epochs is None and state.initial_step >= length.max_train_steps:
        yield f"--initial_step ({state.initial_step}) must be below --max_train_steps ({length.max_train_steps})."
    if state.initial_epoch is not None and length.max_train_epochs is not None and state.initial_epoch > length.max_train_epochs:
        yield f"--initial_epoch ({state.initial_epoch}) must not be above --max_train_epochs ({length.max_train_epochs})."


def _training_notes(options: TrainingOptions) -> Iterator[str]:
    if options.compile.dynamo_backend != "inductor" and not options.compile.torch_compile:
        yield "--dynamo_backend has no effect without --torch_compile."
    yield from distributed_notes(options)
    yield from class_notes(options)
    for name in ("sample_every_n_steps", "sample_every_n_epochs"):
        if (getattr(options.sample, name) or 0) < 0:
            yield f"--{name} is below 1 and is ignored."
    if options.model.clip_skip is not None:
        yield "--clip_skip has no influence on SDXL, which always uses the second to last layer; it is only noted in the metadata."
    yield from objective_notes(options.noise, options.loss, options.model.v_parameterization)
    if options.state.skip_until_initial_step and not (
        options.state.initial_step or options.state.initial_epoch or options.state.resume
    ):
        yield "--skip_until_initial_step has no effect without --initial_step, --initial_epoch or --resume."
    yield from hub_notes(options.state, options.hub)
    yield from idle_notes(options)
