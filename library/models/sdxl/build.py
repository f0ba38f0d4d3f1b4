"""Build the parts of an SDXL model without memory for their weights: their tensors are on the meta device."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from library.models.sdxl.sizes import SdxlSizes, TextEncoderSizes, UNetSizes
from library.models.sdxl.text_rows import text_body
from library.models.sdxl.unet import UNet
from library.models.sdxl.vae import build_vae


def build_part(part: str, sizes: SdxlSizes) -> nn.Module:
    """Build "unet", "te1", "te2" or "vae"."""
    return _BUILDERS[part](sizes)


def build_parts(sizes: SdxlSizes) -> dict[str, nn.Module]:
    """Build all parts, by their short names."""
    return {part: build(sizes) for part, build in _BUILDERS.items()}


def file_names(module: nn.Module) -> dict[str, str]:
    """Return, for each tensor name of a part's module, its name in `Checkpoint.parts`.

    Some versions of transformers have no `text_model.` before TE1's names; files always have it.
    """
    is_text_encoder = hasattr(text_body(module), "final_layer_norm")

    def file_name(name: str) -> str:
        return f"text_model.{name}" if is_text_encoder and not name.startswith(("text_model.", "text_projection.")) else name

    return {name: file_name(name) for name in module.state_dict()}


def part_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a part's module under the names of `Checkpoint.parts`, as they are saved."""
    names, tensors = file_names(module), module.state_dict()
    return {names[name]: tensor for name, tensor in tensors.items()}


def build_unet(sizes: UNetSizes) -> UNet:
    """Build the U-Net."""
    with torch.device("meta"):
        return UNet(sizes)


def _text_encoder(sizes: TextEncoderSizes) -> nn.Module:
    from library.models.sdxl.text_encoders import build_text_encoder  # with transformers: seconds, which cached captions spare

    return build_text_encoder(sizes)


_BUILDERS: dict[str, Callable[[SdxlSizes], nn.Module]] = {
    "unet": lambda sizes: build_unet(sizes.unet),
    "te1": lambda sizes: _text_encoder(sizes.te1),
    "te2": lambda sizes: _text_encoder(sizes.te2),
    "vae": lambda sizes: build_vae(sizes.vae),
}
