"""Combinations of options that exclude each other, and those that are only odd; nothing here needs torch."""

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from library.options.checks_distributed import distributed_notes, distributed_problems, wants_sharding
from library.options.checks_hub import hub_notes, hub_problems
from library.options.checks_objective import objective_notes, objective_problems
from library.options.checks_optimizer import fused_problems, host_state_problems, is_schedule_free, sets_its_own_rate
from library.options.checks_rates import network_rates, rate_notes, rate_problems
from library.options.checks_swap import compiled_swap_problems, swap_problems, trained_swap_problems
from library.options.dataset_class import class_notes, class_problems
from library.options.groups.cache import CacheOptions
from library.options.groups.compile import GONE_BACKENDS, CompileOptions
from library.options.groups.control_net import ControlNetLLLiteOptions, ControlNetOptions
from library.options.groups.dataset import DatasetOptions
from library.options.groups.generation import GenModelOptions, GenNetworkOptions, PictureOptions, PromptOptions
from library.options.groups.logging import LoggingOptions
from library.options.groups.model import ModelOptions
from library.options.groups.network import NetworkOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions, WorkingPrecisionOptions
from library.options.groups.sample import SampleOptions
from library.options.idle import folder_notes, idle_notes, network_notes, word_notes
from library.options.scripts import (
    CacheLatentsOptions,
    CacheTextEncoderOutputsOptions,
    ScriptOptions,
    SdxlGenImgOptions,
    SdxlTrainControlNetLLLiteOptions,
    SdxlTrainControlNetOptions,
    SdxlTrainNetworkOptions,
    SdxlTrainOptions,
    SdxlTrainTextualInversionOptions,
    TrainingOptions,
)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?<!\.safetensors)(?<!\.ckpt)(?<!\.pt)(?<!\.bin)")
"""`owner/model` on the Hugging Face hub; what ends like a file is meant to be one."""


def find_problems(options: ScriptOptions) -> list[str]:
    """Return one sentence for everything that keeps these options from being used together."""
    match options:
        case SdxlTrainNetworkOptions():
            network = _network_problems(options.network, options.cache)
            return [*_training_problems(options), *network, *rate_problems(options.optimizer, network_rates(options).values())]
        case SdxlTrainOptions():
            return [*_training_problems(options), *_finetune_problems(options)]
        case SdxlTrainTextualInversionOptions():
            return [*_training_problems(options), *_word_problems(options), *_only_rate_problems(options.optimizer)]
        case SdxlTrainControlNetLLLiteOptions():
            rates = rate_problems(options.optimizer, [options.optimizer.learning_rate])
            control = _control_problems(options.control)
            return [*_training_problems(options), *control, *rates, *_only_rate_problems(options.optimizer)]
        case SdxlTrainControlNetOptions():
            return [*_training_problems(options), *_control_net_problems(options.control, options.optimizer)]
        case CacheLatentsOptions() | CacheTextEncoderOutputsOptions():
            return [*_model_problems(options.model), *_source_problems(options.dataset), *_tool_problems(options.dataset)]
        case SdxlGenImgOptions():
            return list(_generation_problems(options))
    return []


def find_notes(options: ScriptOptions) -> list[str]:
    """Return one sentence for everything that is odd but can be done."""
    match options:
        case SdxlTrainOptions():
            return [*_training_notes(options), *_finetune_notes(options)]
        case SdxlTrainNetworkOptions():
            return [*_training_notes(options), *rate_notes(options), *network_notes(options.network)]
        case SdxlTrainTextualInversionOptions():
            return [*_training_notes(options), *word_notes(options.word)]
        case TrainingOptions():
            return list(_training_notes(options))
        case SdxlGenImgOptions():
            return list(_generation_notes(options.model, options.prompt))
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
    yield from compiled_swap_problems(options.precision, options.compile)
    yield from quant_problems(options.precision)
    yield from _compile_problems(options.compile)
    yield from fused_problems(options.optimizer, options.length.gradient_accumulation_steps, options.precision.mixed_precision)
    divided = options.distributed.deepspeed or wants_sharding()
    yield from host_state_problems(options.optimizer, options.precision.mixed_precision, is_divided=divided)
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


def _compile_problems(options: CompileOptions) -> Iterator[str]:
    if options.torch_compile and options.dynamo_backend in GONE_BACKENDS:
        yield (
            f"--dynamo_backend {options.dynamo_backend}: no version of PyTorch that this suite runs on has this compiler. "
            "Choose inductor, which is the default."
        )


def packed_problems(precision: StepPrecisionOptions) -> Iterator[str]:
    """Yield why a model that is trained itself cannot be held in few bits."""
    given = {"--fp8_base": precision.fp8_base, f"--base_quant {precision.base_quant}": precision.base_quant is not None}
    for name in (name for name, is_given in given.items() if is_given):
        yield (
            f"{name} holds frozen weights in few bits, but here the model's own weights are trained, and most steps are smaller "
            "than the last of 8 bits. Leave it out; --full_bf16 with --fused_backward_pass saves more."
        )


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


def _network_problems(network: NetworkOptions, cache: CacheOptions) -> Iterator[str]:
    if network.network_module is None:
        yield "--network_module is missing. For a LoRA give --network_module networks.lora."
    if network.dim_from_weights and network.network_weights is None:
        yield "--dim_from_weights needs --network_weights, the file whose dimensions are taken."
    if network.network_weights is not None and not Path(network.network_weights).is_file():
        yield f"--network_weights: there is no file {network.network_weights}."
    yield from _base_weights_problems(network)
    if network.network_train_unet_only and network.network_train_text_encoder_only:
        yield "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train. Choose one of them."
    if network.network_train_text_encoder_only and cache.cache_text_encoder_outputs:
        yield "--network_train_text_encoder_only excludes --cache_text_encoder_outputs, which freezes their outputs. Choose one."
    rates = network.text_encoder_lr or ()
    if network.unet_lr == 0 and set(network.text_encoder_rates()) == {0.0}:
        yield "--unet_lr and the rates of both text encoders are 0, so nothing is trained. Raise one of them."
    if len(rates) > 2:
        yield f"--text_encoder_lr takes one rate, or one for each of the two text encoders, not {len(rates)}."
    for item in network.network_args or ():
        if not item.partition("=")[0].strip() or "=" not in item:
            yield f"--network_args: {item!r} is not of the form key=value."


def _base_weights_problems(network: NetworkOptions) -> Iterator[str]:
    files, strengths = network.base_weights or (), network.base_weights_multiplier or ()
    for path in files:
        if not Path(path).is_file():
            yield f"--base_weights: there is no file {path}."
    if len(strengths) > len(files):
        yield f"--base_weights_multiplier: {len(strengths)} strengths for {len(files)} files of --base_weights. Give one per file."


def _word_problems(options: SdxlTrainTextualInversionOptions) -> Iterator[str]:
    word, longest = options.word, options.model.max_token_length or 75
    text = word.token_string
    if not text:
        yield "--token_string is missing. Give the word to learn, one that has no meaning yet, such as mychar."
    elif not re.fullmatch(r"\w(?:\S*\w)?", text):
        yield f"--token_string {text!r} is not one word. Give a word without blanks that begins and ends in a letter or digit."
    elif not options.output.output_name and not options.output.is_plain(text):
        yield f"--token_string {text!r} cannot name the files, which are called after the word. Give them an --output_name."
    if word.num_vectors_per_token > longest:
        yield (
            f"--num_vectors_per_token {word.num_vectors_per_token}: a caption has room for {longest} tokens, and what is beyond "
            f"them would not be learned. Give at most {longest}; 1 to 16 are usual."
        )
    if word.weights is not None and not Path(word.weights).is_file():
        yield f"--weights: there is no file {word.weights}."
    if word.use_object_template and word.use_style_template:
        yield "--use_object_template and --use_style_template exclude each other. Choose one."


def _only_rate_problems(optimizer: OptimizerOptions) -> Iterator[str]:
    """Yield that nothing is trained where one rate is that of everything."""
    if optimizer.learning_rate == 0 and not sets_its_own_rate(optimizer):
        yield "--learning_rate is 0, so nothing is trained. Raise it."


def _control_problems(control: ControlNetLLLiteOptions) -> Iterator[str]:
    if control.cond_emb_dim is None:
        yield "--cond_emb_dim is missing. Give the width of what each module sees of the control image, for example 32."
    elif control.cond_emb_dim % 2:
        yield f"--cond_emb_dim is {control.cond_emb_dim}, but it must be even. Give {control.cond_emb_dim + 1}."
    if control.network_dim is None:
        yield "--network_dim is missing. Give the inner width of each module, for example 64."
    if control.network_weights is not None and not Path(control.network_weights).is_file():
        yield f"--network_weights: there is no file {control.network_weights}."


def _control_net_problems(control: ControlNetOptions, optimizer: OptimizerOptions) -> Iterator[str]:
    path = control.controlnet_model_name_or_path
    if path is not None and not Path(path).is_file():
        yield f"--controlnet_model_name_or_path: there is no file {path}. Give the .safetensors file of a ControlNet."
    if path is None and control.control_net_lr == 0:
        yield (
            "--control_net_lr 0 keeps at zero what joins a new ControlNet to the model, so it would never have an effect. "
            "Raise it, or give --controlnet_model_name_or_path."
        )
    elif control.control_net_lr == optimizer.learning_rate == 0:
        yield "--control_net_lr and --learning_rate are both 0, so nothing is trained. Raise one of them."
    yield from rate_problems(optimizer, [rate for rate in (control.control_net_lr, optimizer.learning_rate) if rate])


def _finetune_problems(options: SdxlTrainOptions) -> Iterator[str]:
    finetune, rate = options.finetune, options.optimizer.learning_rate
    yield from packed_problems(options.precision)
    if options.trains_denoiser:
        yield from trained_swap_problems(options.precision, options.optimizer)
    if finetune.train_text_encoder and options.cache.cache_text_encoder_outputs:
        yield "--train_text_encoder excludes --cache_text_encoder_outputs, which freezes their outputs. Choose one."
    of_blocks = finetune.block_rates if rate else None
    rates = [*(of_blocks or (rate,)), *finetune.text_encoder_rates(rate)]
    yield from rate_problems(options.optimizer, rates)
    if not any(rates):
        yield "All learning rates are 0, so nothing is trained. Raise --learning_rate, --block_lr or a rate of the text encoders."


def _finetune_notes(options: SdxlTrainOptions) -> Iterator[str]:
    finetune = options.finetune
    for name in ("learning_rate_te1", "learning_rate_te2"):
        if getattr(finetune, name) and not finetune.train_text_encoder:
            yield f"--{name} has no effect without --train_text_encoder."
    if finetune.block_lr is not None and options.optimizer.learning_rate == 0:
        yield "--learning_rate 0 freezes the whole U-Net, so --block_lr has no effect."
    yield from folder_notes(options.output)


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


def _generation_problems(options: SdxlGenImgOptions) -> Iterator[str]:
    if options.model.ckpt is None:
        yield "--ckpt is missing. Name an SDXL checkpoint file or a diffusers folder."
    yield from _prompt_problems(options.prompt)
    yield from _picture_problems(options.picture)
    yield from _gen_network_problems(options.network)


def _prompt_problems(prompt: PromptOptions) -> Iterator[str]:
    if prompt.prompt is None and prompt.from_file is None and not prompt.interactive:
        yield "There is nothing to draw: give --prompt, or --from_file with one prompt per line."
    if prompt.from_file is not None and not Path(prompt.from_file).is_file():
        yield f"--from_file: there is no file {prompt.from_file}."


def _picture_problems(picture: PictureOptions) -> Iterator[str]:
    for name, side in (("W", picture.W), ("H", picture.H)):
        if side is not None and side % 8:
            yield f"--{name} must be a multiple of 8, not {side}; {round(side / 8) * 8} is near."


def _gen_network_problems(network: GenNetworkOptions) -> Iterator[str]:
    modules, files = len(network.network_module or ()), len(network.network_weights or ())
    if modules != files:
        yield f"--network_module and --network_weights belong together, one file per module; there are {modules} and {files}."
    for name, given in (("network_mul", network.network_mul), ("network_args", network.network_args)):
        if len(given or ()) > max(modules, files):
            yield f"--{name} takes one value per network; there are {len(given or ())} values and {max(modules, files)} networks."


def _generation_notes(model: GenModelOptions, prompt: PromptOptions) -> Iterator[str]:
    if model.clip_skip is not None:
        yield "--clip_skip has no influence on SDXL, which always uses the second to last layer."
    if model.fp16 and model.bf16:
        yield "--fp16 and --bf16 were both given; float16 is used."
    if prompt.no_preview:
        yield "--no_preview has no effect: images are written to --outdir and never shown in a window."
