"""Read LoRA files: the names and shapes of every kind that can be used, and a sentence for those that cannot."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from library.files.tensors import open_tensors
from library.options.errors import UserError

_OTHER_KINDS = {
    "LoHa": re.compile(r"\.hada_"),
    "LoKr": re.compile(r"\.lokr_"),
    "DoRA": re.compile(r"\.dora_scale$"),
    "Tucker LoCon": re.compile(r"\.lora_mid\."),
    "OFT": re.compile(r"\.oft_"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "(IA)³": re.compile(r"\.on_input$"),
    "full-difference": re.compile(r"\.diff(_b)?$"),
}
_PEFT_NAME = re.compile(r"\.lora_[AB]\.|\.lora_linear_layer\.")
_KIND = {"resnets": 0, "attentions": 1}
_DIFFUSERS_BLOCKS: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"down_blocks_(\d+)_(resnets|attentions)_(\d+)_", lambda m: f"input_blocks_{3 * int(m[1]) + int(m[3]) + 1}_{_KIND[m[2]]}_"),
    (r"down_blocks_(\d+)_downsamplers_0_conv", lambda m: f"input_blocks_{3 * int(m[1]) + 3}_0_op"),
    (r"mid_block_resnets_(\d+)_", lambda m: f"middle_block_{2 * int(m[1])}_"),
    (r"mid_block_attentions_0_", lambda m: "middle_block_1_"),
    (r"up_blocks_(\d+)_(resnets|attentions)_(\d+)_", lambda m: f"output_blocks_{3 * int(m[1]) + int(m[3])}_{_KIND[m[2]]}_"),
    (r"up_blocks_(\d+)_upsamplers_0_conv", lambda m: f"output_blocks_{3 * int(m[1]) + 2}_2_conv"),
)
_DIFFUSERS_RESNET = {
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}


class RankAndAlpha(NamedTuple):
    """The size of one adapter."""

    rank: int
    alpha: float


def read_lora(path: str) -> dict[str, Tensor]:
    """Return a file's tensors under the names this suite saves, as `normalise` makes them.

    Raises:
        UserError: the file cannot be read, or holds another kind of adapter.
    """
    with open_tensors(path) as file:
        return normalise(dict(file), path)


def normalise(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Bring LoRA tensors to one form: the checkpoint's names for U-Net layers, and an alpha for every adapter (missing: its rank).

    Args:
        tensors: by their names in a file; U-Net layers in the checkpoint's or in diffusers' names.
        source: the file, for messages.

    Raises:
        UserError: another kind of adapter, or no adapter at all.
    """
    _refuse_other_kinds(tensors, source)
    renamed = {_checkpoint_name(name): tensor for name, tensor in tensors.items()}
    adapters = {name.removesuffix(".lora_down.weight") for name in renamed if name.endswith(".lora_down.weight")}
    if not adapters:
        raise UserError(
            f"{source} holds no LoRA: none of its {len(tensors)} tensors is called *.lora_down.weight. Give another file."
        )
    for adapter in sorted(adapters):
        if f"{adapter}.lora_up.weight" not in renamed:
            raise UserError(f"{source} is incomplete: {adapter} has a lora_down but no lora_up. Save or download it again.")
        alpha = renamed.get(f"{adapter}.alpha", torch.tensor(len(renamed[f"{adapter}.lora_down.weight"])))
        renamed[f"{adapter}.alpha"] = alpha.float().reshape(())
    return renamed


def is_lora(names: Iterable[str]) -> bool:
    """Tell from the names of its tensors whether a file is a plain LoRA, and no other kind of adapter."""
    return not any(pattern.search(name) for name in names for pattern in _OTHER_KINDS.values())


def ranks_of(tensors: Mapping[str, Tensor]) -> dict[str, RankAndAlpha]:
    """Return rank and alpha of every adapter in normalised tensors."""
    downs = {
        name.removesuffix(".lora_down.weight"): len(tensor) for name, tensor in tensors.items() if name.endswith("lora_down.weight")
    }
    return {adapter: RankAndAlpha(rank, float(tensors[f"{adapter}.alpha"])) for adapter, rank in downs.items()}


def _refuse_other_kinds(names: Iterable[str], source: str) -> None:
    for name in names:
        for kind, pattern in _OTHER_KINDS.items():
            if pattern.search(name):
                advice = "use it with --network_module lycoris.kohya"
                raise UserError(f"{source} holds {kind} weights ({name}), which networks.lora cannot use; {advice}.")
        if _PEFT_NAME.search(name):
            raise UserError(
                f"{source} names its LoRA as diffusers or PEFT do ({name}); convert it to the kohya naming (lora_unet_…) first."
            )


def _checkpoint_name(name: str) -> str:
    """Translate a U-Net layer's diffusers name (`lora_unet_down_blocks_…`) to the checkpoint's; return any other as it is."""
    path = name.removeprefix("lora_unet_")
    if path == name or not path.startswith(("down_blocks_", "mid_block_", "up_blocks_")):
        return name
    for pattern, replacement in _DIFFUSERS_BLOCKS:
        if found := re.match(pattern, path):
            inner, dot, suffix = path[found.end() :].partition(".")
            return f"lora_unet_{replacement(found)}{_DIFFUSERS_RESNET.get(inner, inner)}{dot}{suffix}"
    return name
