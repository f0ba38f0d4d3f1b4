"""Write a whole SDXL model: in one file, or as a diffusers folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from library.files.pickle_io import save_pickle_checkpoint
from library.files.safetensors_io import save_safetensors
from library.models.sdxl.checkpoint import Checkpoint
from library.models.sdxl.single_file import single_file_tensors
from library.models.sdxl.sizes import SdxlSizes
from library.models.sdxl.write_folder import in_dtype, write_folder


@dataclass(frozen=True)
class StoredModel:
    """All tensors of a model as they are to be written; those read from a file are mapped, not copied."""

    parts: Mapping[str, Mapping[str, Tensor]]
    """Named as in `Checkpoint.parts`."""
    logit_scale: Tensor | None = None
    markers: frozenset[str] = frozenset()
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of the source: `arch.*` is always kept, since shapes do not tell it; `epoch` and `global_step` of a .ckpt are counted on."""


def stored_model(checkpoint: Checkpoint, trained: Mapping[str, Mapping[str, Tensor]], markers: frozenset[str]) -> StoredModel:
    """Return a model with some tensors replaced and the others as they are in its files.

    Args:
        checkpoint: the opened files.
        trained: by part and name, the tensors that replace those of the files.
        markers: "v_pred" and "ztsnr" as wanted.
    """
    parts = {
        part: {name: replaced[name] if name in replaced else entry.read() for name, entry in entries.items()}
        for part, entries in checkpoint.parts.items()
        for replaced in [trained.get(part, {})]
    }
    logit_scale = checkpoint.logit_scale.read() if checkpoint.logit_scale else None
    return StoredModel(parts, logit_scale, markers, checkpoint.metadata)


def save_model(
    path: Path,
    layout: str,
    model: StoredModel,
    sizes: SdxlSizes,
    *,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    progress: tuple[int, int] = (0, 0),
) -> None:
    """Write a model, atomically; see `Family.save_model`.

    Args:
        path: of the file or folder.
        layout: "safetensors", "ckpt", "diffusers" or "diffusers_safetensors".
        model: what is written.
        sizes: of the model.
        dtype: floating-point tensors are saved as this; None keeps each as it is.
        metadata: added to what the model says of its sizes.
        progress: epochs and steps, added to those of the source in "ckpt".

    Raises:
        UserError: the disk is full or the folder not writable.
    """
    told = {key: value for key, value in model.metadata.items() if key.startswith("arch.")} | dict(metadata)
    if layout.startswith("diffusers"):
        extension = ".safetensors" if layout == "diffusers_safetensors" else ".bin"
        write_folder(path, model.parts, sizes, extension, dtype, told, model.logit_scale, model.markers)
        return
    tensors = single_file_tensors(model.parts, model.logit_scale, model.markers)
    if layout == "safetensors":
        save_safetensors(path, tensors, {"format": "pt"} | told, dtype)
        return
    before = {key: model.metadata.get(key, "") for key in ("epoch", "global_step")}
    counted = {  # other programs also write "1/3" there
        key: (int(text) if text.isdecimal() else 0) + now for (key, text), now in zip(before.items(), progress, strict=True)
    }
    converted = {name: in_dtype(tensor, dtype) for name, tensor in tensors.items()}
    save_pickle_checkpoint(path, {"state_dict": converted, **counted, "metadata": told})
