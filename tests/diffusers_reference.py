"""The same model in diffusers: configuration folders with which diffusers opens a single-file checkpoint of any size, offline.

The independent reference for what `library.models.sdxl.write_folder` writes: it looks alike and shares no line with it on purpose,
so that a mistake in the one shows against the other. Do not merge them.
"""

import json
from pathlib import Path

from library.models.sdxl.sizes import SdxlSizes, TextEncoderSizes, TransformerSize
from library.models.sdxl.tokenizer import open_clip_vocabulary

SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}


def unet_config(sizes: SdxlSizes) -> dict[str, object]:
    """The UNet2DConditionModel configuration; two residual blocks per level."""
    unet = sizes.unet
    levels = [unet.input_blocks[index : index + 2] for index in range(1, len(unet.input_blocks), 3)]
    widths = [level[0][0].out_channels for level in levels]
    depths = [level[0][1].depth if len(level[0]) > 1 else 0 for level in levels]
    heads = [
        width // level[0][1].head_dim if len(level[0]) > 1 and isinstance(level[0][1], TransformerSize) else 1
        for width, level in zip(widths, levels, strict=True)
    ]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "layers_per_block": 2,
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "attention_head_dim": heads,
        "cross_attention_dim": unet.context_dim,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": sizes.size_dim,
        "projection_class_embeddings_input_dim": unet.vector_dim,
        "norm_num_groups": unet.norm_groups,
        "sample_size": 32,
    }


def vae_config(sizes: SdxlSizes) -> dict[str, object]:
    """The AutoencoderKL configuration."""
    levels = len(sizes.vae.widths)
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(sizes.vae.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    }


def text_config(sizes: TextEncoderSizes) -> dict[str, object]:
    """The CLIPTextConfig, with the legacy special token ids of the released models."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if sizes.projection_dim else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp_dim,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "projection_dim": sizes.projection_dim or sizes.width,
        "hidden_act": sizes.activation,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def write_configs(folder: Path, sizes: SdxlSizes) -> Path:
    """Write a diffusers folder without weights: what `from_single_file(file, config=folder)` wants."""
    files = {
        "model_index.json": MODEL_INDEX,
        "unet/config.json": unet_config(sizes),
        "vae/config.json": vae_config(sizes),
        "text_encoder/config.json": text_config(sizes.te1),
        "text_encoder_2/config.json": text_config(sizes.te2),
        "scheduler/scheduler_config.json": SCHEDULER,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        write_tokenizer(folder / name, pad)
    return folder


def write_tokenizer(folder: Path, pad: str) -> None:
    """Write a CLIP tokenizer folder as old and new transformers read it."""
    vocabulary, merges = open_clip_vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
