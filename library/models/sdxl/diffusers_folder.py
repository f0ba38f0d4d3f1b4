"""SDXL as a diffusers folder: one sub-folder per part, with or without the `.fp16` variant, in one or several files each."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from library.files.tensors import open_tensors
from library.models.sdxl.checkpoint import Checkpoint
from library.models.sdxl.single_file import with_text_model
from library.models.sdxl.vae import vae_part
from library.models.weights import Entry, Part, entries
from library.options.errors import UserError

SUBFOLDERS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2", "vae": "vae"}
"""Where the parts of a model lie."""
SINGLE_FILE_FACTS = "single_file.json"
"""Keeps what single files say and diffusers has no place for: their metadata, and OpenCLIP's logit scale."""
_PIPELINES = frozenset({"StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"})
_STEMS = (
    ("diffusion_pytorch_model", ".safetensors"),
    ("model", ".safetensors"),
    ("diffusion_pytorch_model", ".bin"),
    ("pytorch_model", ".bin"),
)
_HUB_PLACES = (*(f"{sub}/" for sub in SUBFOLDERS.values()), "diffusion_pytorch_model")
"""Where weights lie in a model of the hub; the last is for one that is only a VAE. Single files beside them are not fetched."""


def open_folder(folder: Path, prefer_fp16: bool = False, mmap: bool = True, keep_vae_precision: bool = False) -> Checkpoint:
    """Open an SDXL folder; only headers are read.

    Args:
        folder: holds unet/, text_encoder/, text_encoder_2/ and, unless another VAE replaces it, vae/.
        prefer_fp16: take `.fp16` files where there are any, else the plain ones; False prefers the plain ones.
        mmap: as in `open_tensors`.
        keep_vae_precision: prefer the plain files of the VAE all the same.

    Raises:
        UserError: the folder is no SDXL model, or a file of it is missing or damaged.
    """
    _refuse_foreign(folder)
    unet, te1, te2, vae = (
        _open_part(folder / sub, prefer_fp16 and not (part == "vae" and keep_vae_precision), mmap)
        for part, sub in SUBFOLDERS.items()
    )
    for sub, part in (("unet", unet), ("text_encoder", te1), ("text_encoder_2", te2)):
        if not part:
            raise UserError(f"{folder} is not a complete SDXL model: there are no weights in its folder {sub}.")
    parts = {"unet": _ldm_part(unet), "te1": with_text_model(te1), "te2": with_text_model(te2), "vae": vae_part(vae)}
    facts = _read_json(folder / SINGLE_FILE_FACTS)
    told = facts.get("metadata", _sizes_told(folder))
    metadata = {str(key): str(value) for key, value in told.items()}
    markers = _markers(folder).difference(facts.get("no_markers", ()))
    return Checkpoint(str(folder), parts, metadata, markers, _logit_scale(facts))


def _logit_scale(facts: Mapping[str, Any]) -> Entry | None:
    told = facts.get("logit_scale")
    if told is None:
        return None
    value = torch.tensor(told["value"], dtype=getattr(torch, told["dtype"]))
    return Entry((), lambda: value)


def open_vae_folder(folder: Path, prefer_fp16: bool = False, mmap: bool = True) -> Part:
    """Open the VAE in a folder, or in its sub-folder `vae`.

    Raises:
        UserError: there are no VAE weights, or a file of it is missing or damaged.
    """
    tensors = _open_part(folder, prefer_fp16, mmap) or _open_part(folder / "vae", prefer_fp16, mmap)
    if "encoder.conv_in.weight" not in tensors:
        raise UserError(f"There is no VAE in {folder}, nor in its sub-folder vae. Give a VAE file or folder as --vae.")
    return vae_part(tensors)


def hub_snapshot(name: str, prefer_fp16: bool = False) -> Path:
    """Fetch a model from the Hugging Face hub, or find it in the local cache, and return its folder.

    Args:
        name: `owner/model`.
        prefer_fp16: fetch the `.fp16` files if there are any, else the plain ones; False tries the plain ones first.

    Raises:
        UserError: `name` is neither a file nor a model of the hub, or the hub cannot be reached.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"{name} does not exist. Give the path of a checkpoint or a diffusers folder, or a hub name like owner/model."
        )
    from huggingface_hub import snapshot_download

    folder = Path()
    for is_variant in (prefer_fp16, not prefer_fp16):
        weights = "*.fp16*.safetensors" if is_variant else "*.safetensors"
        others = None if is_variant else ["*.fp16*.safetensors"]
        try:
            wanted = ["*.json", *(place + weights for place in _HUB_PLACES)]
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=others))
        except Exception as error:  # the hub's client raises exceptions of its own and of several HTTP libraries
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{name} is no file or folder here, and the Hugging Face hub does not give it: {reason}") from error
        if any(folder.rglob(weights)):
            break
    return folder


def _refuse_foreign(folder: Path) -> None:
    pipeline = _read_json(folder / "model_index.json").get("_class_name", "StableDiffusionXLPipeline")
    if pipeline not in _PIPELINES:
        raise UserError(f"{folder} is not an SDXL base model but a {pipeline}. Give an SDXL base model.")
    if not (folder / "unet").is_dir():
        raise UserError(f"{folder} is not a diffusers model: it has no folder unet. Give a checkpoint file or a diffusers folder.")
    channels = _read_json(folder / "unet" / "config.json").get("in_channels", 4)
    if channels == 9:
        raise UserError(f"{folder} is an SDXL inpainting model; its U-Net takes 9 channels instead of 4. Give an SDXL base model.")


def _open_part(folder: Path, prefer_fp16: bool, mmap: bool) -> Part:
    """Open a part's weights, whichever of the known file names they have; empty if there are none."""
    for variant in (".fp16", "") if prefer_fp16 else ("", ".fp16"):
        for stem, extension in _STEMS:
            single = folder / f"{stem}{variant}{extension}"
            index = folder / f"{stem}{extension}.index{variant}.json"
            if single.is_file():
                return entries(open_tensors(single, mmap))
            if index.is_file():
                return _open_shards(index, mmap)
    return {}


def _open_shards(index: Path, mmap: bool) -> Part:
    weight_map = _read_json(index).get("weight_map", {})
    part: Part = {}
    for file_name in sorted(set(weight_map.values())):
        part |= entries(open_tensors(index.parent / file_name, mmap))
    if missing := weight_map.keys() - part.keys():
        raise UserError(
            f"{index} names tensors that are in none of its files: {', '.join(sorted(missing)[:3])} … Copy the model again."
        )
    return part


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not valid JSON ({error}). Download or copy the model again.") from error
    return content if isinstance(content, dict) else {}


def _markers(folder: Path) -> frozenset[str]:
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    told = {"v_pred": scheduler.get("prediction_type") == "v_prediction", "ztsnr": bool(scheduler.get("rescale_betas_zero_snr"))}
    return frozenset(marker for marker, true in told.items() if true)


def _sizes_told(folder: Path) -> dict[str, str]:
    """Return what shapes cannot tell from the parts' config files, as a single file's metadata would say it."""

    def facts() -> Iterator[tuple[str, Any]]:
        for name, sub in (("te1", "text_encoder"), ("te2", "text_encoder_2")):
            config = _read_json(folder / sub / "config.json")
            yield f"arch.{name}.heads", config.get("num_attention_heads")
            yield f"arch.{name}.act", config.get("hidden_act")
        unet = _read_json(folder / "unet" / "config.json")
        yield "arch.norm_groups", unet.get("norm_num_groups")
        yield "arch.unet.head_dim", _head_dim(unet)
        vae = _read_json(folder / "vae" / "config.json")
        yield "arch.vae.norm_groups", vae.get("norm_num_groups")
        yield "arch.vae.scaling_factor", vae.get("scaling_factor")

    return {key: str(value) for key, value in facts() if value is not None}


def _head_dim(config: Mapping[str, Any]) -> int | None:
    """Return the head width of the innermost level; diffusers' `attention_head_dim` is the number of heads."""
    heads, widths = config.get("attention_head_dim"), config.get("block_out_channels")
    if not heads or not widths:
        return None
    return int(widths[-1]) // int(heads[-1] if isinstance(heads, list) else heads)


_TOP = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
_IN_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
_IN_KIND: dict[str, dict[str, str]] = {"resnets": _IN_RESNET, "attentions": {}, "downsamplers": {"conv.": "op."}, "upsamplers": {}}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")


def _ldm_part(unet: Part) -> Part:
    """Return U-Net tensors given under diffusers names under those of single-file checkpoints."""
    rename = ldm_renamer(unet)
    return {rename(name): entry for name, entry in unet.items()}


def ldm_renamer(names: Mapping[str, object]) -> "_LdmNames":
    """Return a function from the diffusers names of a U-Net to its single-file names; it needs to see all names first."""
    return _LdmNames(names)


class _LdmNames:
    """Diffusers counts blocks per level, single files count them through; the counts per level come from the names."""

    def __init__(self, names: Mapping[str, object]) -> None:
        found = {m.groups() for name in names if (m := _BLOCK.match(name))}
        self._with_attention = {(side, int(level)) for side, level, kind, _ in found if kind == "attentions"}
        self._starts: dict[tuple[str, int], int] = {}
        self._counts: dict[tuple[str, int], int] = {}
        for side, start, sampler_takes_block in (("down", 1, 1), ("up", 0, 0)):
            for level in sorted({int(found_level) for s, found_level, _, _ in found if s == side}):
                count = sum(1 for s, at, kind, _ in found if (s, int(at), kind) == (side, level, "resnets"))
                self._starts[side, level], self._counts[side, level] = start, count
                sampled = any((s, int(at)) == (side, level) and kind.endswith("samplers") for s, at, kind, _ in found)
                start += count + (sampler_takes_block if sampled else 0)

    def __call__(self, name: str) -> str:
        block = _BLOCK.match(name)
        if block:
            prefix = self._block_prefix(block[1], int(block[2]), block[3], int(block[4]))
            rest = name[block.end() :]
            return prefix + _replaced(rest, _IN_KIND[block[3]])
        renamed = _replaced(name, _TOP)
        if renamed.startswith(("middle_block.0.", "middle_block.2.")):
            return renamed[:15] + _replaced(renamed[15:], _IN_RESNET)
        return renamed

    def _block_prefix(self, side: str, level: int, kind: str, index: int) -> str:
        start, count = self._starts[side, level], self._counts[side, level]
        group = "input_blocks" if side == "down" else "output_blocks"
        if kind == "downsamplers":
            return f"{group}.{start + count}.0."
        if kind == "upsamplers":
            return f"{group}.{start + count - 1}.{2 if (side, level) in self._with_attention else 1}."
        return f"{group}.{start + index}.{0 if kind == 'resnets' else 1}."


def _replaced(name: str, table: Mapping[str, str]) -> str:
    """Return `name` with the one beginning that `table` knows replaced."""
    for old, new in table.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name
