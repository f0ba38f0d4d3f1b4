"""What an SDXL model consists of on disk, whatever kind of file or folder it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from library.models.weights import Entry, Part

PART_TITLES = {"unet": "U-Net", "te1": "first text encoder", "te2": "second text encoder", "vae": "VAE"}
"""The parts of a model by the short names used throughout, and what people call them."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model, part by part, under the names of the modules they go into; none is read yet.

    `unet` has the names of single-file checkpoints, `te1` and `te2` those of transformers (always with `text_model.`), `vae` those
    of diffusers.
    """

    path: str
    parts: dict[str, Part]
    metadata: Mapping[str, str] = field(default_factory=dict)
    markers: frozenset[str] = frozenset()
    """`v_pred` and `ztsnr` where the file says so."""
    logit_scale: Entry | None = None
    """A number that OpenCLIP's files carry and SDXL never uses; kept for files saved later."""
    origins: Mapping[str, Path] = field(default_factory=dict)
    """The file or folder that has a part as it is; a part whose tensors are changed when they are read has none."""
    ignored: tuple[str, ...] = ()
    """Names of tensors that belong to no part."""


def told_prediction(metadata: Mapping[str, str]) -> str | None:
    """Return what modelspec metadata says that the U-Net predicts, "v" or "epsilon"; None where it says nothing."""
    told = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key") or ""
    return "v" if told.startswith("v") else "epsilon" if told.startswith("eps") else None
