"""SDXL in one file: the layout of Stability's release, which every program of the field reads."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from library.files.tensors import open_tensors
from library.models.sdxl.checkpoint import Checkpoint
from library.models.sdxl.identify import refuse_foreign
from library.models.sdxl.open_clip_names import from_open_clip, to_open_clip
from library.models.sdxl.vae import count_levels, is_attention_matrix, vae_part
from library.models.weights import Entry, Part, entries, without_prefix

PREFIXES = {
    "unet": "model.diffusion_model.",
    "te1": "conditioner.embedders.0.transformer.",
    "te2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}
_LOGIT_SCALE = "logit_scale"
_DEFAULT_LOGIT_SCALE = 4.6052
"""ln 100, the value CLIP training clips at; OpenCLIP's own loader wants the key to exist."""
_MARKERS = frozenset({"v_pred", "ztsnr"})
_SILENTLY_IGNORED = re.compile(r"model_ema\.|denoiser\.sigmas$|.*position_ids$")


def open_single_file(path: str, mmap: bool = True) -> Checkpoint:
    """Open an SDXL checkpoint; only its header is read.

    Raises:
        UserError: the file is missing, damaged or something else than SDXL.
    """
    file = open_tensors(path, mmap)
    tensors = entries(file)
    refuse_foreign(path, {name: entry.shape for name, entry in tensors.items()})
    te2 = without_prefix(tensors, PREFIXES["te2"])
    parts = {
        "unet": without_prefix(tensors, PREFIXES["unet"]),
        "te1": with_text_model(without_prefix(tensors, PREFIXES["te1"])),
        "te2": from_open_clip({name: entry for name, entry in te2.items() if name != _LOGIT_SCALE and "position_ids" not in name}),
        "vae": vae_part(without_prefix(tensors, PREFIXES["vae"])),
    }
    known = tuple(PREFIXES.values())
    return Checkpoint(
        path=path,
        parts=parts,
        metadata=file.metadata,
        markers=_MARKERS & tensors.keys(),
        logit_scale=te2.get(_LOGIT_SCALE),
        ignored=tuple(n for n in tensors if not n.startswith(known) and n not in _MARKERS and not _SILENTLY_IGNORED.match(n)),
    )


def with_text_model(part: Mapping[str, Entry]) -> Part:
    """Return text encoder tensors with `text_model.` before each name, which some versions of transformers leave out."""
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": entry
        for name, entry in part.items()
        if not name.endswith("position_ids")
    }


def single_file_tensors(
    parts: Mapping[str, Mapping[str, Tensor]], logit_scale: Tensor | None = None, markers: frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """Return the parts' tensors under the names, and in the shapes, of a single file.

    Args:
        parts: tensors of `unet`, `te1`, `te2` and `vae`, named as in `Checkpoint.parts`.
        logit_scale: OpenCLIP's; its usual value where there is none.
        markers: "v_pred" and "ztsnr" as wanted.
    """
    te2 = to_open_clip(parts["te2"])
    if logit_scale is None:
        logit_scale = torch.tensor(_DEFAULT_LOGIT_SCALE, dtype=te2["text_projection"].dtype)
    named = {
        "unet": parts["unet"],
        "te1": parts["te1"],
        "te2": te2 | {_LOGIT_SCALE: logit_scale},
        "vae": single_file_vae(parts["vae"]),
    }
    tensors = {PREFIXES[part] + name: tensor for part, group in named.items() for name, tensor in group.items()}
    return tensors | {marker: torch.zeros(0) for marker in sorted(markers)}


_VAE_RENAMES = (
    (re.compile(r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\."), r"encoder.down.\1.block.\2."),
    (re.compile(r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\."), r"encoder.down.\1.downsample."),
    (re.compile(r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\."), r"decoder.up.\1.block.\2."),
    (re.compile(r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\."), r"decoder.up.\1.upsample."),
    (re.compile(r"\.mid_block\.resnets\.0\."), ".mid.block_1."),
    (re.compile(r"\.mid_block\.resnets\.1\."), ".mid.block_2."),
    (re.compile(r"\.mid_block\.attentions\.0\.group_norm\."), ".mid.attn_1.norm."),
    (re.compile(r"\.mid_block\.attentions\.0\.to_([qkv])\."), r".mid.attn_1.\1."),
    (re.compile(r"\.mid_block\.attentions\.0\.to_out\.0\."), ".mid.attn_1.proj_out."),
    (re.compile(r"\.conv_shortcut\."), ".nin_shortcut."),
    (re.compile(r"\.conv_norm_out\."), ".norm_out."),
)


def single_file_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a VAE's tensors, given under diffusers names, under the names and in the shapes of a single file (no prefix)."""
    levels = count_levels(tensors)
    converted = {}
    for name, tensor in tensors.items():
        if is_attention_matrix(name):
            tensor = tensor[:, :, None, None]
        for pattern, replacement in _VAE_RENAMES:
            name = pattern.sub(replacement, name)
        converted[re.sub(r"^(decoder\.up\.)(\d+)", lambda m: f"{m[1]}{levels - 1 - int(m[2])}", name)] = tensor
    return converted
