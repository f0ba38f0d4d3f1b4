"""Combinations that exclude each other are refused; what is only odd is said and done."""

import logging

import pytest

from library.options.checks_optimizer import check_optimizer_options
from library.options.errors import UsageError
from library.options.groups.image import ImageOptions
from library.options.parse import parse
from library.options.scripts import (
    CacheLatentsOptions,
    CacheTextEncoderOutputsOptions,
    SdxlGenImgOptions,
    SdxlTrainNetworkOptions,
    SdxlTrainOptions,
)

TRAIN = "--pretrained_model_name_or_path owner/model --output_dir o --network_module networks.lora --train_data_dir d"
DRAW = "--ckpt m --prompt cat"

REFUSED = [
    ("--v2", "--v2 is for Stable Diffusion 2.x"),
    ("--torch_compile --dynamo_backend tensort", "has this compiler"),
    ("--cpu_offload_checkpointing", "so it needs --gradient_checkpointing"),
    ("--checkpoint_fraction 0.5", "so it needs --gradient_checkpointing"),
    ("--gradient_checkpointing --checkpoint_fraction 0", "--checkpoint_fraction"),
    ("--blocks_to_swap 9 --offload_fraction 0.5", "Give one of them"),
    ("--torch_compile --dynamo_backend cudagraphs", "has not been tried"),
    ("--optimizer_states host --mixed_precision fp16", "--optimizer_states host cannot step in parts under"),
    (
        "--optimizer_states host --optimizer_type Prodigy --learning_rate 1",
        "--optimizer_states host steps parameters in parts, but",
    ),
    (
        "--optimizer_states host --optimizer_type PagedAdamW8bit",
        "PagedAdamW8bit moves its state itself. Choose one of the two, or Ada",
    ),
    ("--fp8_base --base_quant nf4", "--fp8_base and --base_quant nf4 hold the same weights in two ways"),
    ("--fp8_base_unet --base_quant int8", "--fp8_base_unet and --base_quant int8 hold the same weights in two ways"),
    ("--ddp_static_graph --gradient_accumulation_steps 2", "excludes --gradient_accumulation_steps above 1"),
    ("--adaptive_noise_scale 0.1", "needs --noise_offset above 0"),
    ("--adaptive_noise_scale 0.1 --noise_offset 0", "needs --noise_offset above 0"),
    ("--min_timestep 500 --max_timestep 500", "--min_timestep (500) must be below --max_timestep (500)"),
    ("--ema_decay 0.9 --optimizer_type AdamWScheduleFree", "as schedule-free optimizers do themselves"),
    ("--ema_device device", "it needs --ema_decay"),
    ("--base_weights missing.safetensors", "there is no file missing.safetensors"),
    ("--base_weights_multiplier 0.5", "1 strengths for 0 files"),
    ("--logit_mean 0.5", "but they are drawn uniformly"),
    ("--scale_v_pred_loss_like_noise_pred", "needs --v_parameterization"),
    ("--v_pred_like_loss 0.1 --v_parameterization", "excludes --v_parameterization"),
    (f"--tokenizer_cache_dir {__file__}", "is not a folder that can be read"),
    ("--vae missing.safetensors", "there is no file or folder missing.safetensors"),
    ("--vae models/missing.safetensors", "there is no file or folder models/missing.safetensors"),
    ("--dim_from_weights", "needs --network_weights"),
    ("--network_weights missing.safetensors", "there is no file missing.safetensors"),
    ("--network_train_unet_only --network_train_text_encoder_only", "leave nothing to train"),
    ("--cache_latents_posterior", "--cache_latents_posterior needs --cache_latents"),
    ("--network_train_text_encoder_only --cache_text_encoder_outputs_to_disk", "excludes --cache_text_encoder_outputs"),
    ("--unet_lr 0 --text_encoder_lr 0", "so nothing is trained"),
    ("--text_encoder_lr 1 2 3", "one for each of the two text encoders, not 3"),
    ("--network_args conv_dim", "'conv_dim' is not of the form key=value"),
    ("--network_args =4", "'=4' is not of the form key=value"),
    ("--sample_every_n_steps 5", "need --sample_prompts"),
    ("--sample_at_first --sample_prompts missing.txt", "there is no file missing.txt"),
    ("--log_with tensorboard", "needs --logging_dir"),
    ("--resume missing", "there is no folder missing"),
    ("--initial_step 10 --max_train_steps 10", "--initial_step (10) must be below --max_train_steps (10)"),
    ("--initial_epoch 3 --max_train_epochs 2", "--initial_epoch (3) must not be above --max_train_epochs (2)"),
    ("--persistent_data_loader_workers --max_data_loader_n_workers 0", "needs workers"),
]

ACCEPTED = [
    "--fp8_base --base_quant fp8",
    "--adaptive_noise_scale 0 --noise_offset 0",
    "--min_timestep 0 --max_timestep 1",
    "--v_pred_like_loss 0 --v_parameterization",
    "--text_encoder_lr 1e-4 2e-4 --learning_rate 1e-4",
    "--unet_lr 0 --text_encoder_lr1 1e-5 --text_encoder_lr2 1e-5",
    "--vae madebyollin/sdxl-vae-fp16-fix",
    "--tokenizer_cache_dir made_by_others",
    f"--dim_from_weights --network_weights {__file__}",
    "--max_train_epochs 2",
    "--network_args conv_dim=4 rank_dropout=0.1",
    "--sample_every_n_steps 0 --sample_every_n_epochs 0",
    "--log_with tensorboard --logging_dir logs",
    "--initial_step 9 --max_train_steps 10",
    "--initial_step 5000 --max_train_epochs 10",
    "--scale_v_pred_loss_like_noise_pred --v_parameterization",
]

ODD = [
    ("--clip_skip 2", "--clip_skip has no influence on SDXL"),
    ("--zero_terminal_snr", "--zero_terminal_snr is meant for v-prediction"),
    ("--huber_scale 2 --loss_type huber", "--huber_scale has no effect"),
    ("--huber_c 0.2", "--huber_c has no effect with --loss_type l2"),
    ("--huber_schedule constant", "--huber_schedule has no effect with --loss_type l2"),
    ("--noise_offset_random_strength", "--noise_offset_random_strength has no effect without --noise_offset"),
    ("--ip_noise_gamma_random_strength", "--ip_noise_gamma_random_strength has no effect without --ip_noise_gamma"),
    ("--multires_noise_discount 0.5", "--multires_noise_discount has no effect without"),
    ("--skip_until_initial_step", "--skip_until_initial_step has no effect"),
    ("--network_train_unet_only --text_encoder_lr 1e-4 --learning_rate 1e-4", "--text_encoder_lr has no effect"),
    ("--cache_text_encoder_outputs --text_encoder_lr2 1e-4 --learning_rate 1e-4", "--text_encoder_lr2 has no effect"),
    ("--network_train_text_encoder_only --unet_lr 1e-4 --learning_rate 1e-4", "--unet_lr has no effect"),
    (f"--dim_from_weights --network_weights {__file__} --network_dim 8", "--network_dim has no effect beside --dim_from_weights"),
    (f"--dim_from_weights --network_weights {__file__} --network_alpha 8", "--network_alpha has no effect beside"),
]

FUSED = "--fused_backward_pass --optimizer_type Adafactor --optimizer_args relative_step=False"
FINETUNE = "--pretrained_model_name_or_path owner/model --train_data_dir d --output_dir o"
FINETUNE_REFUSED = [
    ("--blocks_to_swap 9", "add --fused_backward_pass"),
    ("--offload_fraction 0.5 --fused_optimizer_groups 4", "add --fused_backward_pass"),
    ("--fp8_base", "here the model's own weights are trained"),
    ("--base_quant fp8", "--base_quant fp8 holds frozen weights in few bits, but here the model's own weights are trained"),
    ("--train_text_encoder --cache_text_encoder_outputs", "--train_text_encoder excludes --cache_text_encoder_outputs"),
    ("--learning_rate 0", "All learning rates are 0"),
    ("--learning_rate 0 --train_text_encoder --learning_rate_te1 0", "All learning rates are 0"),
    (f"--block_lr {','.join(['0'] * 23)}", "All learning rates are 0"),
    ("--block_lr 1e-5,1e-5", "these are 2"),
    (f"--block_lr {','.join(['x'] * 23)}", "'x' is not a number"),
    (f"--block_lr {','.join(['1e-5'] * 22)},nan", "'nan' is not a number"),
    (f"--block_lr inf,{','.join(['1e-5'] * 22)}", "'inf' is not a number"),
    ("--full_bf16", "--full_bf16 keeps weights in the type of the computation, so it needs --mixed_precision bf16"),
    ("--full_fp16 --mixed_precision bf16", "needs --mixed_precision fp16"),
    (f"{FUSED} --gradient_accumulation_steps 2", "--gradient_accumulation_steps 2 has nothing to add up"),
    (f"{FUSED} --fused_optimizer_groups 4", "exclude each other"),
    (f"{FUSED} --mixed_precision fp16", "cannot undo the gradient scaling"),
    ("--fused_backward_pass --optimizer_type Prodigy --learning_rate 1", "Prodigy steps all of them at once"),
    ("--fused_optimizer_groups 4 --optimizer_type AdamWScheduleFree", "AdamWScheduleFree steps all of them at once"),
    ("--fused_backward_pass --optimizer_type collections.Counter", "Counter steps all of them at once, or is not known"),
    ("--fused_backward_pass --optimizer_type torch.optim.LBFGS", "LBFGS steps all of them at once"),
    ("--learning_rate=-1e-5", "is negative, which AdamW cannot use"),
    ("--train_text_encoder --learning_rate_te1=-1e-5", "The learning rate -1e-05 is negative, which AdamW cannot use"),
    (f"--block_lr={','.join(['-1e-5'] * 23)}", "is negative, which AdamW cannot use"),
]
FINETUNE_ACCEPTED = [
    "--blocks_to_swap 0",
    "--blocks_to_swap 9 --fused_backward_pass --optimizer_type AdamW8bit",
    "--learning_rate=-1e-5 --optimizer_type Adafactor --optimizer_args relative_step=False",
    FUSED,
    "--fused_optimizer_groups 10",
    "--fused_backward_pass --optimizer_type Lion8bit",
    "--fused_backward_pass --optimizer_type torch.optim.Adamax",
    "--fused_optimizer_groups 0 --gradient_accumulation_steps 2",
    "--learning_rate 0 --train_text_encoder --learning_rate_te2 1e-6",
    f"--block_lr {','.join(['0'] * 22)},1e-5",
    "--full_bf16 --mixed_precision bf16",
    "--save_model_as diffusers --use_safetensors",
]
FINETUNE_ODD = [
    ("--learning_rate_te1 1e-6", "--learning_rate_te1 has no effect without --train_text_encoder"),
    ("--use_safetensors --save_model_as ckpt", "--use_safetensors has no effect"),
    ("--use_safetensors", "models are saved as safetensors"),
]

GENERATION_REFUSED = [
    ("", "--ckpt is missing"),
    ("--ckpt m", "There is nothing to draw"),
    ("--ckpt m --from_file missing.txt", "there is no file missing.txt"),
    (f"{DRAW} --W 1001", "--W must be a multiple of 8, not 1001; 1000 is near"),
    (f"{DRAW} --network_module networks.lora", "there are 1 and 0"),
    (f"{DRAW} --network_module networks.lora --network_weights a --network_mul 1 2", "there are 2 values and 1 networks"),
]


def refusal(script, command, further=None):
    with pytest.raises(UsageError) as error:
        parse(script, command.split(), further)
    return error.value.problems


@pytest.mark.parametrize(("typed", "words"), REFUSED)
def test_what_cannot_be_used_together_is_refused_in_one_sentence(typed, words):
    (told,) = refusal(SdxlTrainNetworkOptions, f"{TRAIN} {typed}")
    assert words in told


@pytest.mark.parametrize("typed", ACCEPTED)
def test_what_can_be_used_together_is_taken_without_a_word(typed, caplog):
    with caplog.at_level(logging.INFO):
        parse(SdxlTrainNetworkOptions, f"{TRAIN} {typed}".split())
    assert caplog.messages == []


@pytest.mark.parametrize(("typed", "words"), ODD)
def test_what_is_only_odd_is_said(typed, words, caplog):
    parse(SdxlTrainNetworkOptions, f"{TRAIN} {typed}".split())
    (told,) = caplog.messages
    assert words in told


def test_few_bits_without_their_package_are_refused(monkeypatch):
    monkeypatch.setattr("library.options.checks.find_spec", lambda name: None)
    (told,) = refusal(SdxlTrainNetworkOptions, f"{TRAIN} --base_quant nf4")
    assert told == "--base_quant nf4 needs the package bitsandbytes: pip install bitsandbytes, or use --base_quant fp8."


@pytest.mark.parametrize(("typed", "words"), FINETUNE_REFUSED)
def test_what_cannot_be_used_together_in_fine_tuning_is_refused_in_one_sentence(typed, words, monkeypatch):
    monkeypatch.setattr("library.options.checks.find_spec", lambda name: None)
    (told,) = refusal(
        SdxlTrainOptions, f"{FINETUNE} {typed}", lambda options: check_optimizer_options(options.optimizer, options.scheduler)
    )
    assert words in told


@pytest.mark.parametrize("typed", FINETUNE_ACCEPTED)
def test_what_can_be_used_together_in_fine_tuning_is_taken_without_a_word(typed, caplog):
    with caplog.at_level(logging.INFO):
        parse(SdxlTrainOptions, f"{FINETUNE} {typed}".split())
    assert caplog.messages == []


@pytest.mark.parametrize(("typed", "words"), FINETUNE_ODD)
def test_what_is_only_odd_in_fine_tuning_is_said(typed, words, caplog):
    parse(SdxlTrainOptions, f"{FINETUNE} {typed}".split())
    (told,) = caplog.messages
    assert words in told


@pytest.mark.parametrize(("typed", "words"), GENERATION_REFUSED)
def test_image_generation_names_what_is_missing(typed, words):
    assert any(words in told for told in refusal(SdxlGenImgOptions, typed))


@pytest.mark.parametrize(
    ("typed", "words"),
    [("--clip_skip 2", "no influence"), ("--fp16 --bf16", "float16 is used"), ("--no_preview", "never shown in a window")],
)
def test_image_generation_says_what_is_odd(typed, words, caplog):
    parse(SdxlGenImgOptions, f"{DRAW} {typed}".split())
    (told,) = caplog.messages
    assert words in told


@pytest.mark.parametrize("script", [CacheLatentsOptions, CacheTextEncoderOutputsOptions])
def test_caching_tools_need_a_model_and_images_and_assume_sdxl(script):
    told = " ".join(refusal(script, ""))
    assert "--pretrained_model_name_or_path is missing" in told
    assert "There are no training images" in told
    assert not parse(script, ["--pretrained_model_name_or_path", "owner/model", "--train_data_dir", "d"]).tool.sdxl


@pytest.mark.parametrize("typed", ["--fused_backward_pass", "--fused_optimizer_groups 4"])
def test_several_processes_that_step_in_the_backward_pass_are_refused(typed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (told,) = refusal(SdxlTrainOptions, f"{FINETUNE} {typed}")
    assert "before the 2 processes have exchanged its gradient" in told
    monkeypatch.setenv("WORLD_SIZE", "1")
    parse(SdxlTrainOptions, f"{FINETUNE} {typed}".split())


@pytest.mark.parametrize(
    ("script", "typed", "group"), [(SdxlTrainOptions, FINETUNE, "precision"), (SdxlGenImgOptions, DRAW, "model")]
)
@pytest.mark.parametrize(("more", "kind"), [("", "sdpa"), ("--xformers", "xformers"), ("--diffusers_xformers", "xformers")])
def test_both_names_of_xformers_choose_its_attention(script, typed, group, more, kind, monkeypatch):
    monkeypatch.setattr("library.options.checks.find_spec", lambda name: object())
    assert getattr(parse(script, f"{typed} {more}".split()), group).attention == kind


@pytest.mark.parametrize(("typed", "package"), [("--log_with wandb", "wandb"), ("--xformers", "xformers")])
def test_a_missing_package_is_refused_with_the_pip_command(typed, package, monkeypatch):
    monkeypatch.setattr("library.options.checks.find_spec", lambda name: None)
    (told,) = refusal(SdxlTrainNetworkOptions, f"{TRAIN} {typed}")
    assert f"pip install {package}" in told


@pytest.mark.parametrize(
    ("text", "words"),
    [("4,2", "not above the second"), ("0,2", "above 0"), ("2", "two numbers with a comma"), ("a,b", "two numbers")],
)
def test_a_face_crop_range_is_two_numbers_in_order(text, words):
    with pytest.raises(ValueError, match=words):
        ImageOptions(face_crop_aug_range=text)
    assert ImageOptions(face_crop_aug_range="2.0,4.0").face_crop_aug_range == "2.0,4.0"
