"""TE2's tensors under OpenCLIP's names (single files) and transformers' names (modules)."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from library.models.weights import Entry, Part

_TOP = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)$")
_IN_PROJ = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")
_HF_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")


def from_open_clip(part: Mapping[str, Entry]) -> Part:
    """Rename, split and transpose OpenCLIP tensors; names that OpenCLIP does not have are kept as they are."""
    converted: Part = {}
    for name, entry in part.items():
        if in_proj := _IN_PROJ.match(name):
            converted |= _split_in_proj(entry, f"text_model.encoder.layers.{in_proj[1]}.self_attn.", in_proj[2])
        elif name == "text_projection":
            # OpenCLIP multiplies from the right (x P), a Linear layer by the transpose (x Wᵀ).
            converted["text_projection.weight"] = entry.then(lambda t: t.T, entry.shape[::-1])
        elif (layer := _LAYER.match(name)) and layer[2] in _IN_LAYER:
            converted[f"text_model.encoder.layers.{layer[1]}.{_IN_LAYER[layer[2]]}.{layer[3]}"] = entry
        else:
            converted[_TOP.get(name, name)] = entry
    return converted


def _split_in_proj(entry: Entry, prefix: str, kind: str) -> Part:
    width = entry.shape[0] // 3
    shape = (width, *entry.shape[1:])

    def third(number: int) -> Entry:
        return entry.then(lambda t: t[number * width : (number + 1) * width], shape)

    return {f"{prefix}{letter}_proj.{kind}": third(number) for number, letter in enumerate("qkv")}


def to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return TE2's tensors, given under transformers names, under OpenCLIP's; the result's tensors are contiguous."""
    top = {hf: name for name, hf in _TOP.items()}
    in_layer = {hf: name for name, hf in _IN_LAYER.items()}
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = _HF_LAYER.match(name)
        if name == "text_projection.weight":
            converted["text_projection"] = tensor.T.contiguous()
        elif layer is None:
            converted[top[name]] = tensor
        elif layer[2] in in_layer:
            converted[f"transformer.resblocks.{layer[1]}.{in_layer[layer[2]]}.{layer[3]}"] = tensor
        elif layer[2] == "self_attn.q_proj":
            qkv = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            converted[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(qkv)
    return converted
