"""What each training script asks of what it trains: networks, words, control networks, and models themselves."""

import re
from collections.abc import Iterator
from pathlib import Path

from library.options.checks_optimizer import sets_its_own_rate
from library.options.checks_rates import network_rates, rate_notes, rate_problems
from library.options.checks_swap import trained_swap_problems
from library.options.groups.network import NetworkOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from library.options.idle import folder_notes, network_notes, word_notes
from library.options.scripts import (
    SdxlTrainControlNetLLLiteOptions,
    SdxlTrainControlNetOptions,
    SdxlTrainNetworkOptions,
    SdxlTrainOptions,
    SdxlTrainTextualInversionOptions,
    TrainingOptions,
)


def trained_problems(options: TrainingOptions) -> Iterator[str]:
    """Yield what keeps that from being trained which the script trains."""
    match options:
        case SdxlTrainNetworkOptions():
            yield from _network_problems(options)
        case SdxlTrainOptions():
            yield from _finetune_problems(options)
        case SdxlTrainTextualInversionOptions():
            yield from _word_problems(options)
        case SdxlTrainControlNetLLLiteOptions():
            yield from _lllite_problems(options)
        case SdxlTrainControlNetOptions():
            yield from _control_net_problems(options)


def trained_notes(options: TrainingOptions) -> Iterator[str]:
    """Yield what is odd about what is trained."""
    match options:
        case SdxlTrainNetworkOptions():
            yield from rate_notes(options)
            yield from network_notes(options.network)
        case SdxlTrainOptions():
            yield from _finetune_notes(options)
        case SdxlTrainTextualInversionOptions():
            yield from word_notes(options.word)


def _network_problems(options: SdxlTrainNetworkOptions) -> Iterator[str]:
    network = options.network
    if network.network_module is None:
        yield "--network_module is missing. For a LoRA give --network_module networks.lora."
    if network.dim_from_weights and network.network_weights is None:
        yield "--dim_from_weights needs --network_weights, the file whose dimensions are taken."
    if network.network_weights is not None and not Path(network.network_weights).is_file():
        yield f"--network_weights: there is no file {network.network_weights}."
    yield from _base_weights_problems(network)
    if network.network_train_unet_only and network.network_train_text_encoder_only:
        yield "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train. Choose one of them."
    if network.network_train_text_encoder_only and options.cache.cache_text_encoder_outputs:
        yield "--network_train_text_encoder_only excludes --cache_text_encoder_outputs, which freezes their outputs. Choose one."
    rates = network.text_encoder_lr or ()
    if network.unet_lr == 0 and set(network.text_encoder_rates()) == {0.0}:
        yield "--unet_lr and the rates of both text encoders are 0, so nothing is trained. Raise one of them."
    if len(rates) > 2:
        yield f"--text_encoder_lr takes one rate, or one for each of the two text encoders, not {len(rates)}."
    for item in network.network_args or ():
        if not item.partition("=")[0].strip() or "=" not in item:
            yield f"--network_args: {item!r} is not of the form key=value."
    yield from rate_problems(options.optimizer, network_rates(options).values())


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
    yield from _only_rate_problems(options.optimizer)


def _only_rate_problems(optimizer: OptimizerOptions) -> Iterator[str]:
    """Yield that nothing is trained where one rate is that of everything."""
    if optimizer.learning_rate == 0 and not sets_its_own_rate(optimizer):
        yield "--learning_rate is 0, so nothing is trained. Raise it."


def _lllite_problems(options: SdxlTrainControlNetLLLiteOptions) -> Iterator[str]:
    control = options.control
    if control.cond_emb_dim is None:
        yield "--cond_emb_dim is missing. Give the width of what each module sees of the control image, for example 32."
    elif control.cond_emb_dim % 2:
        yield f"--cond_emb_dim is {control.cond_emb_dim}, but it must be even. Give {control.cond_emb_dim + 1}."
    if control.network_dim is None:
        yield "--network_dim is missing. Give the inner width of each module, for example 64."
    if control.network_weights is not None and not Path(control.network_weights).is_file():
        yield f"--network_weights: there is no file {control.network_weights}."
    yield from rate_problems(options.optimizer, [options.optimizer.learning_rate])
    yield from _only_rate_problems(options.optimizer)


def _control_net_problems(options: SdxlTrainControlNetOptions) -> Iterator[str]:
    control, optimizer = options.control, options.optimizer
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


def packed_problems(precision: StepPrecisionOptions) -> Iterator[str]:
    """Yield why a model that is trained itself cannot be held in few bits."""
    given = {"--fp8_base": precision.fp8_base, f"--base_quant {precision.base_quant}": precision.base_quant is not None}
    for name in (name for name, is_given in given.items() if is_given):
        yield (
            f"{name} holds frozen weights in few bits, but here the model's own weights are trained, and most steps are smaller "
            "than the last of 8 bits. Leave it out; --full_bf16 with --fused_backward_pass saves more."
        )
