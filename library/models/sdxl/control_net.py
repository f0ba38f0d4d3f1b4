"""ControlNet for SDXL (Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models"), in diffusers' files.

A copy of the U-Net's way down sees the control image besides the latents; what its blocks give goes through 1×1 convolutions that
begin at zero, and is added to what the frozen U-Net's blocks give.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.files.tensors import open_tensors, save_tensors, to_save
from library.models.sdxl.sizes import SdxlSizes
from library.models.sdxl.unet import UNetEncoder
from library.models.sdxl.write_folder import diffusers_unet_names, unet_config
from library.models.weights import Entry, Part, disagreements, entries, fill
from library.options.errors import UserError

_NEW = "controlnet_"
"""How the names of what the U-Net does not have begin, here and in files."""
_STEM_CHANNELS = (16, 32, 96, 256)
_PIXELS = 8
"""Of the control image per position of the latents, in each direction."""


class ConditioningStem(nn.Module):
    """Eight convolutions from the control image to the latents' size, the last of them zero at first."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, _STEM_CHANNELS[0], 3, padding=1)
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise(_STEM_CHANNELS):
            blocks += [nn.Conv2d(before, before, 3, padding=1), nn.Conv2d(before, after, 3, padding=1, stride=2)]
        self.blocks = nn.ModuleList(blocks)
        self.conv_out = _zero(nn.Conv2d(_STEM_CHANNELS[-1], out_channels, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, 8h, 8w) in [0, 1] to (N, C, h, w)."""
        h = F.silu(self.conv_in(images))
        for block in self.blocks:
            h = F.silu(block(h))
        out: Tensor = self.conv_out(h)
        return out


class SdxlControlNet(UNetEncoder):
    """A ControlNet; without effect until `apply_to` and `see` were called, and untrained even then.

    What the U-Net has too is on the meta device until it is filled.

    Args:
        sizes: of the model.

    Raises:
        UserError: diffusers has no names for the U-Net's blocks, as in pruned models.
    """

    names: Mapping[str, str]
    """Each tensor name here, and what files call it."""

    def __init__(self, sizes: SdxlSizes) -> None:
        with torch.device("meta"):
            super().__init__(sizes.unet)
        self.multiplier = 1.0
        self._images: Tensor | None = None
        blocks = sizes.unet.input_blocks
        widths = [block[0].out_channels for block in blocks]  # type: ignore[union-attr]  # none begins with a transformer
        self.controlnet_cond_embedding = ConditioningStem(sizes.unet.model_channels)
        self.controlnet_down_blocks = nn.ModuleList(_zero(nn.Conv2d(width, width, 1)) for width in widths)
        self.controlnet_mid_block = _zero(nn.Conv2d(widths[-1], widths[-1], 1))
        of_unet = diffusers_unet_names(unet_config(sizes))
        self.names = {name: name if name.startswith(_NEW) else of_unet[name] for name in self.state_dict()}

    def copied_parameters(self) -> list[nn.Parameter]:
        """Return the weights that began as the U-Net's."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith(_NEW)]

    def new_parameters(self) -> list[nn.Parameter]:
        """Return the weights of the stem and of the convolutions that began at zero."""
        return [parameter for name, parameter in self.named_parameters() if name.startswith(_NEW)]

    def apply_to(self, denoiser: nn.Module) -> None:
        """Take part in the forward pass of a U-Net."""
        forward = denoiser.forward

        def forward_with_control(x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor) -> Any:
            return forward(x, timesteps, context, y, self.residuals(x, timesteps, context, y))

        denoiser.forward = forward_with_control

    def on_epoch_start(self, text_encoders: Any, unet: Any) -> None:
        """Switch to training mode."""
        self.train()

    def see(self, images: Tensor | None) -> None:
        """Take control images in [-1, 1], which the stem is given in [0, 1]; see `library.models.control.Control`."""
        self._images = None if images is None else (images + 1) / 2

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength; 0 leaves the U-Net as it is."""
        self.multiplier = multiplier

    def residuals(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor) -> list[Tensor] | None:
        """Return what is added to the U-Net's, for the same arguments; None where nothing is.

        Raises:
            ValueError: the control images are of another size or number than the pictures.
        """
        images = self._images
        if images is None or self.multiplier == 0:
            return None
        x, context, emb = self.embedded(x, timesteps, context, y)
        size = tuple(side * _PIXELS for side in x.shape[-2:])
        if x.shape[0] % images.shape[0] or images.shape[-2:] != size:
            raise ValueError(
                f"{images.shape[0]} control images of {tuple(images.shape[-2:])} do not fit {x.shape[0]} pictures of {size}: they "
                "must have the pictures' size and number"
            )
        hint = self.controlnet_cond_embedding(images.to(x.dtype)).repeat(x.shape[0] // images.shape[0], 1, 1, 1)
        down, middle = self.encoded(x, context, emb, hint)
        convolutions = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        return [conv(h) * self.multiplier for conv, h in zip(convolutions, (*down, middle), strict=True)]

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the network atomically under diffusers' names; see `library.models.control.Control`."""
        tensors = {self.names[name]: tensor for name, tensor in self.state_dict().items()}
        save_tensors(file, to_save(tensors, dtype), metadata)


def make_control_net(
    sizes: SdxlSizes, unet: Mapping[str, Entry], file: str | None, dtype: torch.dtype, device: torch.device
) -> SdxlControlNet:
    """Make a ControlNet in training mode that begins as the U-Net, or as a file has it.

    Args:
        sizes: of the model.
        unet: its tensors, under the names of single-file checkpoints.
        file: of a ControlNet under diffusers' names; None begins anew.
        dtype: of the weights.
        device: where they go.

    Raises:
        UserError: the file cannot be read or is of another kind or size, or diffusers has no names for this U-Net's blocks.
    """
    network = SdxlControlNet(sizes)
    names = network.names
    if file is None:
        fresh = {name: _kept(tensor) for name, tensor in network.state_dict().items() if name.startswith(_NEW)}
        part = {names[name]: fresh[name] if name in fresh else unet[name] for name in names}
    else:
        part = read_control_net(file)
        wanted = {names[name]: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        unknown = [f"{name} is not known" for name in sorted(part.keys() - wanted.keys())]
        for problem in [*disagreements(part, wanted), *unknown]:
            raise UserError(f"{file} does not fit this model: {problem}. Is it for another model?")
    fill(network, part, names, dtype, device)
    return network.train().requires_grad_(True)


def read_control_net(file: str) -> Part:
    """Return the tensors of a ControlNet's file.

    Raises:
        UserError: it cannot be read, or is no ControlNet in diffusers' names.
    """
    part = entries(open_tensors(file))
    if not any(name.startswith(_NEW) for name in part):
        raise UserError(
            f"{file} is no ControlNet in diffusers' layout: none of its tensors is called {_NEW}…. Give the file of one, such as "
            "its diffusion_pytorch_model.safetensors."
        )
    return part


def _zero(convolution: nn.Conv2d) -> nn.Conv2d:
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution


def _kept(tensor: Tensor) -> Entry:
    return Entry(tuple(tensor.shape), lambda: tensor)
