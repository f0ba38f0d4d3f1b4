"""Find a model's files and check that together they are a complete SDXL model, from headers alone."""

import logging
from dataclasses import replace
from pathlib import Path

from library.files.tensors import open_tensors
from library.models.family import ModelSource
from library.models.sdxl.build import build_unet
from library.models.sdxl.checkpoint import PART_TITLES, Checkpoint
from library.models.sdxl.diffusers_folder import hub_snapshot, open_folder, open_vae_folder
from library.models.sdxl.part_shapes import Shape, text_encoder_shapes, vae_shapes
from library.models.sdxl.single_file import PREFIXES, open_single_file
from library.models.sdxl.sizes import SdxlSizes, text_encoder_sizes, unet_sizes, vae_sizes
from library.models.sdxl.vae import vae_part
from library.models.weights import Part, disagreements, entries, shapes, without_prefix
from library.options.errors import UserError

logger = logging.getLogger(__name__)

_SHOWN = 3
"""How many tensor names a message shows."""


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Open the model, and the VAE that replaces its own where the source names one.

    Raises:
        UserError: a file is missing, damaged or not what it should be.
    """
    path = Path(source.path)
    if path.is_file():
        checkpoint = open_single_file(source.path, source.mmap)
    else:
        folder = path if path.is_dir() else hub_snapshot(source.path, source.prefer_fp16_variant)
        checkpoint = open_folder(folder, source.prefer_fp16_variant, source.mmap, source.keep_vae_precision)
    origins = dict.fromkeys(checkpoint.parts, Path(checkpoint.path))
    if source.vae is not None:
        place = _vae_place(source.vae, source)
        checkpoint = replace(checkpoint, parts=checkpoint.parts | {"vae": _open_vae(place, source)})
        origins["vae"] = place
    checkpoint = replace(checkpoint, origins=origins)
    if checkpoint.ignored:
        logger.warning("%s: %s", source.path, _naming(checkpoint.ignored, "tensors are no part of SDXL and are ignored"))
    return checkpoint


def _vae_place(path: str, source: ModelSource) -> Path:
    return Path(path) if Path(path).exists() else hub_snapshot(path, source.prefer_fp16_variant)


def _open_vae(path: Path, source: ModelSource) -> Part:
    """Open a VAE: a folder, a VAE file under either kind of name, or a whole checkpoint."""
    if path.is_dir():
        return open_vae_folder(path, source.prefer_fp16_variant and not source.keep_vae_precision, source.mmap)
    tensors = entries(open_tensors(path, source.mmap))
    tensors = without_prefix(tensors, PREFIXES["vae"]) or tensors
    if "encoder.conv_in.weight" not in tensors:
        first = ", ".join(list(tensors)[:_SHOWN]) or "none"
        raise UserError(f"{path} is not a VAE: it has no encoder.conv_in.weight. Its tensors: {first} … Give a VAE as --vae.")
    return vae_part(
        {name: entry for name, entry in tensors.items() if name.startswith(("encoder.", "decoder.", "quant", "post_quant"))}
    )


def check_parts(checkpoint: Checkpoint) -> SdxlSizes:
    """Read all sizes from tensor shapes and check that every part is complete and that they fit together.

    Raises:
        UserError: names the part, and the first tensors that are missing or of the wrong shape.
    """
    found = {name: shapes(part) for name, part in checkpoint.parts.items()}
    about = checkpoint.metadata
    if not found["vae"]:
        raise UserError(f"{checkpoint.path} has no VAE. Give one as --vae.")
    try:
        sizes = SdxlSizes(
            unet=unet_sizes(found["unet"], about),
            te1=text_encoder_sizes(found["te1"], about, "te1", "quick_gelu"),
            te2=text_encoder_sizes(found["te2"], about, "te2", "gelu"),
            vae=vae_sizes(found["vae"], about),
        )
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{checkpoint.path} is not a complete SDXL checkpoint: its sizes cannot be read ({error}).") from error
    _check_fit(checkpoint.path, sizes)
    for name, wanted in part_shapes(sizes).items():
        _check_part(checkpoint.path, PART_TITLES[name], checkpoint.parts[name], wanted)
    return sizes


def part_shapes(sizes: SdxlSizes) -> dict[str, dict[str, Shape]]:
    """Return the shapes of the tensors of every part, by the parts' short names."""
    return {
        "unet": {name: tuple(tensor.shape) for name, tensor in build_unet(sizes.unet).state_dict().items()},
        "te1": text_encoder_shapes(sizes.te1),
        "te2": text_encoder_shapes(sizes.te2),
        "vae": vae_shapes(sizes.vae),
    }


def _check_part(path: str, title: str, part: Part, wanted: dict[str, Shape]) -> None:
    if problems := disagreements(part, wanted):
        raise UserError(
            f"{path}: its {title} does not fit SDXL's, {_naming(problems, 'tensors are affected')}. "
            "Download or convert the model again."
        )
    if unknown := [name for name in part if name not in wanted]:
        logger.warning("%s: %s", path, _naming(unknown, f"tensors of its {title} are unknown and are ignored"))


def _check_fit(path: str, sizes: SdxlSizes) -> None:
    widths = sizes.te1.width + sizes.te2.width
    if sizes.unet.context_dim != widths:
        raise UserError(
            f"{path}: its U-Net takes a text context of width {sizes.unet.context_dim}, but its text encoders give "
            f"{sizes.te1.width} + {sizes.te2.width} = {widths}. The parts belong to different models."
        )
    left = sizes.unet.vector_dim - sizes.te2.projection_dim
    if left <= 0 or left % 12:
        raise UserError(
            f"{path}: its U-Net takes a vector of {sizes.unet.vector_dim}; after {sizes.te2.projection_dim} of pooled text, {left} "
            "are left, which is not six size embeddings of even width. The parts belong to different models."
        )


def _naming(names: list[str] | tuple[str, ...], what: str) -> str:
    more = ", …" if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"
