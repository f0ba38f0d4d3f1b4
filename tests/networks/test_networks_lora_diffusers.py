"""Files of this suite in diffusers, and files with diffusers' names here."""

import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.models import UNet2DConditionModel

from library.models.family import ModelSource, SizeConditioning
from library.models.sdxl.family import SdxlFamily
from networks.lora import create_network
from networks.lora_files import normalise
from tools.make_tiny_sdxl import main as make_tiny_sdxl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusers_reference import write_configs

CPU = torch.device("cpu")


class UNetConfig:
    layers_per_block = 2


SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def diffusers_unet():
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)


def shapes_of(file_keys, section):
    return {name: torch.zeros(shape) for name, shape in file_keys[section].items() if not name.startswith("_")}


@pytest.mark.parametrize("section", ["networks.lora/lierla", "networks.lora/c3lier"])
def test_every_key_of_a_file_finds_its_layer_in_diffusers(file_keys, diffusers_unet, section):
    tensors = _maybe_map_sgm_blocks_to_diffusers(shapes_of(file_keys, section), UNetConfig)
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(tensors)
    modules = dict(diffusers_unet.named_modules())
    unet_keys = [name for name in converted if name.startswith("unet.")]
    for name in unet_keys:
        path = re.sub(r"(\.|_)lora(_linear_layer)?\.(down|up)\.weight$", "", name.removeprefix("unet."))
        path = path.replace(".processor", "").replace("to_out", "to_out.0").replace("to_out.0.0", "to_out.0")
        assert path in modules, name
    assert len(converted) == 2 * file_keys[section]["_count"] // 3
    assert len(unet_keys) == 2 * (788 if section.endswith("c3lier") else 722)
    assert set(alphas.values()) <= {0.0}


def diffusers_name(name):
    """Write a U-Net key as diffusers does, by its own rules of numbering (SDXL: two layers per block)."""
    kind = {"0": "resnets", "1": "attentions"}
    layers = {"in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2", "skip_connection": "conv_shortcut"}
    if found := re.match(r"lora_unet_input_blocks_(\d+)_0_op(.*)", name):
        return f"lora_unet_down_blocks_{int(found[1]) // 3 - 1}_downsamplers_0_conv{found[2]}"
    if found := re.match(r"lora_unet_output_blocks_(\d+)_2_conv(.*)", name):
        return f"lora_unet_up_blocks_{int(found[1]) // 3}_upsamplers_0_conv{found[2]}"
    for ours, theirs in layers.items():
        name = name.replace(ours, theirs)
    if found := re.match(r"lora_unet_input_blocks_(\d+)_([01])_(.*)", name):
        block = int(found[1]) - 1
        return f"lora_unet_down_blocks_{block // 3}_{kind[found[2]]}_{block % 3}_{found[3]}"
    if found := re.match(r"lora_unet_output_blocks_(\d+)_([01])_(.*)", name):
        return f"lora_unet_up_blocks_{int(found[1]) // 3}_{kind[found[2]]}_{int(found[1]) % 3}_{found[3]}"
    if found := re.match(r"lora_unet_middle_block_([012])_(.*)", name):
        return f"lora_unet_mid_block_{'attentions_0' if found[1] == '1' else 'resnets_' + str(int(found[1]) // 2)}_{found[2]}"
    return name


def test_a_file_with_diffusers_names_is_read_as_ours(file_keys):
    ours = shapes_of(file_keys, "networks.lora/c3lier")
    theirs = {diffusers_name(name): tensor for name, tensor in ours.items()}
    assert not any("_blocks_" in name and ("input" in name or "output" in name) for name in theirs)
    assert normalise(theirs, "a.safetensors").keys() == ours.keys()


def test_a_key_that_only_looks_like_a_name_of_diffusers_stays_as_it_is():
    name = "lora_unet_down_blocks_none_of_ours"
    tensors = {f"{name}.lora_down.weight": torch.zeros(1, 1), f"{name}.lora_up.weight": torch.zeros(1, 1)}
    assert f"{name}.alpha" in normalise(tensors, "a.safetensors")


@pytest.fixture(scope="module")
def same_model(tmp_path_factory):
    """One tiny checkpoint, opened here and by diffusers: (family, pipeline)."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_sdxl([str(folder / "tiny.safetensors"), "--dtype", "fp32"])
    family = SdxlFamily.open(ModelSource(str(folder / "tiny.safetensors")))
    configs = write_configs(folder / "configs", family.sizes)
    path = str(folder / "tiny.safetensors")
    return family, StableDiffusionXLPipeline.from_single_file(path, config=str(configs), local_files_only=True)


@pytest.mark.parametrize("args", [{}, {"conv_dim": "2", "conv_alpha": "1"}, {"block_dims": ",".join(["2", "3"] * 11 + ["2"])}])
def test_a_saved_file_does_in_diffusers_what_it_does_here(same_model, randomise, tmp_path, args):
    family, pipeline = same_model
    unet = family.load_denoiser(torch.float32, CPU)
    encoders = family.load_text_encoders(torch.float32, CPU)
    network = randomise(create_network(1.0, 2, 1, None, encoders, unet, **args))
    network.apply_to(encoders, unet)
    network.save_weights(str(tmp_path / "lora.safetensors"), None, {"ss_base_model_version": "sdxl_base_v1-0"})
    sizes = family.sizes.unet
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    context, vector = torch.randn(1, 77, sizes.context_dim), torch.randn(1, sizes.vector_dim)
    added = {"text_embeds": vector[:, : family.sizes.te2.projection_dim], "time_ids": torch.ones(1, 6)}
    tokens = family.tokenize(["a photograph of a cat"])
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    try:
        ids = tokens["ids1"].reshape(1, -1)
        theirs = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        theirs_2 = pipeline.text_encoder_2(tokens["ids2"].reshape(1, -1), output_hidden_states=True)
        drawn = pipeline.unet(x, t, context, added_cond_kwargs=added).sample
    finally:
        pipeline.unload_lora_weights()
    cond = family.encode_text(tokens, encoders)
    sizes_of_ones = SizeConditioning(*[torch.ones(1, 2, dtype=torch.int64)] * 3)
    torch.testing.assert_close(theirs, cond["hidden1"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs_2.hidden_states[-2], cond["hidden2"], rtol=1e-4, atol=1e-5)
    width = family.sizes.te1.width
    ours = family.predict(
        unet, x, t, {"hidden1": context[..., :width], "hidden2": context[..., width:], "pool2": added["text_embeds"]}, sizes_of_ones
    )
    torch.testing.assert_close(drawn, ours, rtol=1e-4, atol=1e-5)
    network.set_enabled(False)
    assert not torch.allclose(family.encode_text(tokens, encoders)["hidden1"], theirs, atol=1e-3)
