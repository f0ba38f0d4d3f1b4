"""Write SDXL as a diffusers folder that `StableDiffusionXLPipeline.from_pretrained` opens without a network."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.files.atomic import atomic_folder
from library.files.pickle_io import save_pickle_checkpoint
from library.files.safetensors_io import save_safetensors
from library.models.sdxl.checkpoint import told_prediction
from library.models.sdxl.diffusers_folder import SINGLE_FILE_FACTS, SUBFOLDERS, ldm_renamer
from library.models.sdxl.sizes import DownsampleSize, SdxlSizes, TextEncoderSizes, TransformerSize
from library.models.sdxl.tokenizer import open_clip_vocabulary
from library.options.errors import UserError

_MODEL_INDEX = {
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
_PADS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}


def write_folder(
    path: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    sizes: SdxlSizes,
    extension: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    logit_scale: Tensor | None,
    markers: frozenset[str],
) -> None:
    """Write a model as a folder; it takes its name when all of it is on the disk.

    Args:
        path: of the folder, which is made or replaced.
        parts: tensors by part and name, as in `Checkpoint.parts`.
        sizes: of the model.
        extension: of the weights, ".safetensors" or ".bin".
        dtype: floating-point tensors are saved as this; None keeps each as it is.
        metadata: goes to a file that only this suite reads, with what else a single file has and a folder has no place for.
        logit_scale: OpenCLIP's, or None.
        markers: "v_pred" and "ztsnr" as a single file would have them; metadata may say the former too.

    Raises:
        UserError: the U-Net is not one that diffusers has, the disk is full, or the folder is not writable.
    """
    implied = frozenset({"v_pred"} if told_prediction(metadata) == "v" else ()) - markers
    unet = unet_config(sizes, str(path))
    names = diffusers_unet_names(unet)
    named = {**parts, "unet": {names[name]: tensor for name, tensor in parts["unet"].items()}}
    configs: dict[str, Mapping[str, Any]] = {
        "model_index.json": _MODEL_INDEX,
        SINGLE_FILE_FACTS: single_file_facts(metadata, logit_scale, implied),
        "scheduler/scheduler_config.json": scheduler_config(markers | implied),
        "unet/config.json": unet,
        "vae/config.json": vae_config(sizes),
        "text_encoder/config.json": text_config(sizes.te1),
        "text_encoder_2/config.json": text_config(sizes.te2),
    }
    with atomic_folder(path) as folder:
        for name, config in configs.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, pad in _PADS.items():
            write_tokenizer(folder / name, pad)
        for part, subfolder in SUBFOLDERS.items():
            write_weights(folder / subfolder, part, named[part], extension, dtype)


def write_weights(folder: Path, part: str, tensors: Mapping[str, Tensor], extension: str, dtype: torch.dtype | None) -> None:
    """Write the tensors of one part under the file name that diffusers or transformers looks for."""
    is_text = part.startswith("te")
    if extension == ".safetensors":
        stem = "model" if is_text else "diffusion_pytorch_model"
        save_safetensors(folder / f"{stem}.safetensors", tensors, {"format": "pt"}, dtype)
        return
    stem = "pytorch_model" if is_text else "diffusion_pytorch_model"
    save_pickle_checkpoint(folder / f"{stem}.bin", {name: in_dtype(tensor, dtype) for name, tensor in tensors.items()})


def in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a floating-point tensor in another type; others, and all where `dtype` is None, as they are."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def single_file_facts(metadata: Mapping[str, str], logit_scale: Tensor | None, implied: frozenset[str]) -> dict[str, Any]:
    """Return what a single file says and a folder has no place for, so that converting back loses and adds nothing.

    Args:
        metadata: of the file.
        logit_scale: OpenCLIP's, or None.
        implied: markers that the file does not have, though the scheduler's configuration says what they would.
    """
    facts: dict[str, Any] = {"metadata": dict(metadata)}
    if implied:
        facts["no_markers"] = sorted(implied)
    if logit_scale is not None:
        facts["logit_scale"] = {"value": logit_scale.double().item(), "dtype": str(logit_scale.dtype).removeprefix("torch.")}
    return facts


def scheduler_config(markers: frozenset[str]) -> dict[str, Any]:
    """Return the configuration of SDXL's scheduler, with what the markers say."""
    return {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if "v_pred" in markers else "epsilon",
        "rescale_betas_zero_snr": "ztsnr" in markers,
        "timestep_spacing": "trailing" if "ztsnr" in markers else "leading",
        "steps_offset": 1,
    }


def unet_config(sizes: SdxlSizes, path: str = "the model") -> dict[str, Any]:
    """Return the configuration of diffusers' UNet2DConditionModel.

    Raises:
        UserError: the blocks are not laid out as diffusers' are, as in pruned models.
    """
    unet = sizes.unet
    levels: list[list[tuple[Any, ...]]] = [[]]
    for block in unet.input_blocks[1:]:
        if isinstance(block[0], DownsampleSize):
            levels.append([])
        else:
            levels[-1].append(block)
    transformers = [[layer for block in level for layer in block if isinstance(layer, TransformerSize)] for level in levels]
    counts = {len(level) for level in levels}
    depths = [[layer.depth for layer in level] for level in transformers]
    if len(counts) > 1 or any(found and (len(set(found)) > 1 or {len(found)} != counts) for found in depths):
        raise UserError(f"{path} cannot be a diffusers folder: the levels of its U-Net differ in a way diffusers has no words for.")
    widths = [level[0][0].out_channels for level in levels]
    heads = [width // level[0].head_dim if level else 1 for width, level in zip(widths, transformers, strict=True)]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if found else "DownBlock2D" for found in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if found else "UpBlock2D" for found in reversed(depths)],
        "layers_per_block": counts.pop(),
        "transformer_layers_per_block": [found[0] if found else 1 for found in depths],
        "attention_head_dim": heads,
        "cross_attention_dim": unet.context_dim,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": sizes.size_dim,
        "projection_class_embeddings_input_dim": unet.vector_dim,
        "norm_num_groups": unet.norm_groups,
        "sample_size": 128,
    }


def diffusers_unet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the diffusers name of each single-file name of a U-Net."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        names = UNet2DConditionModel.from_config(dict(config)).state_dict()
    rename = ldm_renamer(names)
    return {rename(name): name for name in names}


def vae_config(sizes: SdxlSizes) -> dict[str, Any]:
    """Return the configuration of diffusers' AutoencoderKL."""
    levels = len(sizes.vae.widths)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": sizes.vae.image_channels,
        "out_channels": sizes.vae.image_channels,
        "block_out_channels": list(sizes.vae.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": sizes.vae.layers_per_block,
        "latent_channels": sizes.vae.latent_channels,
        "norm_num_groups": sizes.vae.norm_groups,
        "scaling_factor": sizes.vae.scaling_factor,
        "sample_size": 1024,
        "force_upcast": True,
    }


def text_config(sizes: TextEncoderSizes) -> dict[str, Any]:
    """Return the configuration of a text encoder, with the class transformers opens it with."""
    from library.models.sdxl.text_encoders import build_text_encoder

    config: dict[str, Any] = build_text_encoder(sizes).config.to_dict()
    return config | {
        "architectures": ["CLIPTextModelWithProjection" if sizes.projection_dim else "CLIPTextModel"],
        # Older versions of transformers pool at the largest id where the end token's is 2, the value of the released models.
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def write_tokenizer(folder: Path, pad: str) -> None:
    """Write a tokenizer folder as old and new versions of transformers read it.

    Args:
        folder: is made.
        pad: what fills a row after its end token.
    """
    vocabulary, merges = open_clip_vocabulary()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
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
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
