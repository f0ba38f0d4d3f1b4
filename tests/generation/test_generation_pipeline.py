"""The drawing loop, against diffusers' pipeline and against itself."""

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from tiny_pipeline import CPU, difference, load_components
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from library.generation.pipeline import Pipeline
from library.generation.request import ImageRequest
from library.models.prompt_weights import PromptStyle
from library.models.sdxl.tokenizer import open_clip_vocabulary

REQUEST = ImageRequest("a red cat on a mat", "blurry dog", width=96, height=64, steps=4, cfg_scale=5.0, seed=7, sampler="ddim")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "ddim": DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="leading"),
    "euler": EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace"),
    "euler_a": EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="linspace"),
    "dpmsolver++": DPMSolverMultistepScheduler(**BETAS, timestep_spacing="linspace", algorithm_type="dpmsolver++"),
}


@pytest.fixture(scope="module")
def reference(components) -> StableDiffusionXLPipeline:
    """Diffusers' own pipeline from diffusers' and transformers' own classes, with the tiny model's weights."""
    unet_config = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (64, 64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 1, 2),
        "cross_attention_dim": 192,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": components.denoiser.sizes.vector_dim,
        "use_linear_projection": True,
    }
    unet = UNet2DConditionModel(**unet_config)
    ldm = {f"model.diffusion_model.{name}": tensor for name, tensor in components.denoiser.state_dict().items()}
    unet.load_state_dict(convert_ldm_unet_checkpoint(ldm, {**unet_config, "class_embed_type": None}))
    te1, te2 = components.text_encoders
    clip = CLIPTextModel(te1.config)
    clip.load_state_dict(te1.state_dict())
    big = CLIPTextModelWithProjection(te2.config)
    big.load_state_dict(te2.state_dict())
    vae = AutoencoderKL.from_config(components.vae.config)
    vae.load_state_dict(components.vae.state_dict())
    vocabulary, merges = open_clip_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=77)
    tokenizer_2 = copy.deepcopy(tokenizer)
    tokenizer_2.pad_token = "!"
    return StableDiffusionXLPipeline(
        vae, clip, big, tokenizer, tokenizer_2, unet, SCHEDULERS["ddim"], force_zeros_for_empty_prompt=False, add_watermarker=False
    )


def draw_reference(reference: StableDiffusionXLPipeline, request: ImageRequest):
    reference.scheduler = SCHEDULERS[request.sampler]
    reference.set_progress_bar_config(disable=True)
    return reference(
        request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        guidance_scale=request.cfg_scale,
        generator=[torch.Generator().manual_seed(request.seed)],
        original_size=(request.original_wh or (request.width, request.height))[::-1],
        target_size=(request.height, request.width),
        crops_coords_top_left=request.crop_top_left,
        negative_original_size=(request.negative_original_wh or request.original_wh or (request.width, request.height))[::-1],
        negative_target_size=(request.height, request.width),
        negative_crops_coords_top_left=request.crop_top_left,
    ).images[0]


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_a_picture_equals_the_one_diffusers_draws(pipeline, reference, sampler):
    request = replace(REQUEST, sampler=sampler)
    ours, theirs = pipeline.draw([request])[0], draw_reference(reference, request)
    assert np.asarray(theirs).std() > 10, "a flat picture would prove nothing"
    assert difference(ours, theirs) < 0.1


def test_a_picture_with_other_sizes_told_equals_the_one_diffusers_draws(pipeline, reference):
    request = replace(REQUEST, original_wh=(640, 320), negative_original_wh=(96, 32), crop_top_left=(8, 16))
    ours = pipeline.draw([request])[0]
    assert difference(ours, draw_reference(reference, request)) < 0.1
    assert difference(ours, pipeline.draw([REQUEST])[0]) > 0.1


def test_a_picture_without_guidance_equals_the_one_diffusers_draws(pipeline, reference):
    request = replace(REQUEST, cfg_scale=1.0)
    assert difference(pipeline.draw([request])[0], draw_reference(reference, request)) < 0.1


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpm_2_a"])
def test_a_picture_does_not_depend_on_its_batch(pipeline, sampler):
    """A long neighbour, another guidance scale, another size: each picture is what it is alone."""
    requests = [
        replace(REQUEST, sampler=sampler),
        replace(REQUEST, sampler=sampler, prompt="x", seed=8, cfg_scale=3.0),
        replace(REQUEST, sampler=sampler, prompt="cat, " * 60, seed=9),
        replace(REQUEST, sampler=sampler, seed=10, height=96),
        replace(REQUEST, sampler=sampler, seed=11, cfg_scale=1.0),
    ]
    pipeline.style = PromptStyle(max_chunks=3)
    for together, request in zip(pipeline.draw(requests), requests, strict=True):
        assert together.size == (request.width, request.height)
        assert difference(together, pipeline.draw([request])[0]) < 0.1


def test_seeds_make_pictures(pipeline):
    first, again, other, random = pipeline.draw([REQUEST, REQUEST, replace(REQUEST, seed=8), replace(REQUEST, seed=None)])
    assert difference(first, again) == 0
    assert difference(first, other) > 5
    assert difference(first, random) > 5


def test_drawing_leaves_the_global_generator_alone(pipeline):
    before = torch.get_rng_state()
    pipeline.draw([replace(REQUEST, sampler="euler_a")])
    assert torch.equal(before, torch.get_rng_state())


def test_encoded_prompts_can_be_drawn_without_text_encoders(family, components, pipeline):
    encoded = pipeline.encode([REQUEST])
    bare = Pipeline(family, replace(components, text_encoders=[None, None]), device=CPU)
    assert difference(bare.draw([REQUEST], encoded=encoded)[0], pipeline.draw([REQUEST])[0]) == 0
    with pytest.raises(ValueError, match="The text encoder is not loaded"):
        bare.draw([REQUEST])


def test_v_prediction_changes_the_picture(family, components, pipeline):
    velocity = Pipeline(family, components, device=CPU, prediction_type="v_prediction", zero_terminal_snr=True)
    assert difference(velocity.draw([REQUEST])[0], pipeline.draw([REQUEST])[0]) > 1


def test_every_step_is_told(pipeline):
    told = []
    pipeline.draw([REQUEST, replace(REQUEST, seed=8)], on_step=lambda done, steps: told.append((done, steps)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_sides_the_model_cannot_draw_are_rounded_down_and_told(pipeline, caplog):
    picture = pipeline.draw([replace(REQUEST, width=120, height=72)])[0]
    assert picture.size == (96, 64)
    assert "120x72 is drawn as 96x64" in caplog.text


def test_a_picture_that_is_not_finite_is_black_counted_and_named(family, caplog):
    broken = load_components(family)
    next(broken.denoiser.parameters()).data[0] = float("nan")
    pipeline = Pipeline(family, broken, device=CPU)
    picture = pipeline.draw([REQUEST])[0]
    assert np.asarray(picture).max() == 0
    assert pipeline.num_not_finite == 1
    assert 'The picture of "a red cat on a mat" (seed 7) is black' in caplog.text


def test_a_vae_that_overflows_in_half_precision_decodes_again_in_float32(family, pipeline, caplog):
    """Weights this large fit in float16; what they make of the activations only fits in float32."""
    half = load_components(family)
    block = half.vae.decoder.up_blocks[-1].resnets[-1]
    block.conv2.weight.data *= 6e4
    block.conv2.bias.data *= 6e4
    half.vae.half()
    with caplog.at_level(logging.WARNING):
        pictures = Pipeline(family, half, device=CPU).draw([REQUEST])
    assert "decoded again in float32" in caplog.text
    assert np.asarray(pictures[0]).max() > 0
    assert half.vae.dtype == torch.float16


def test_bfloat16_and_autocast_draw_nearly_the_same(family, components, pipeline):
    exact = pipeline.draw([REQUEST])[0]
    rounded = Pipeline(family, components, device=CPU, autocast_dtype=torch.bfloat16).draw([REQUEST])[0]
    assert 0 < difference(rounded, exact) < 6
