"""Control networks while pictures are drawn: which guide images the model follows, and in which steps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from library.dataset.formats import teach_pillow
from library.generation.additions import ControlFile
from library.generation.request import ImageRequest
from library.models.control import Control
from library.options.errors import UserError
from networks.control_net_lllite import from_file


class Controls:
    """Control networks attached to a denoiser.

    Args:
        networks: applied, on the denoiser's device.
        files: one for each, with strength and share of steps.
    """

    def __init__(self, networks: Sequence[Control], files: Sequence[ControlFile]) -> None:
        self._networks = list(networks)
        self._files = list(files)

    @classmethod
    def attach(cls, files: Sequence[ControlFile], denoiser: nn.Module, dtype: torch.dtype, device: torch.device) -> "Controls":
        """Load ControlNet-LLLite files into a denoiser.

        Raises:
            UserError: a file cannot be read or is of another model.
        """
        networks = []
        for file in files:
            network = from_file(denoiser, file.path, file.multiplier)
            network.to(device, dtype).eval().requires_grad_(False)
            network.apply_to()
            networks.append(network)
        return cls(networks, files)

    def begin(self, requests: Sequence[ImageRequest]) -> None:
        """Take the guide images of a batch of pictures, all of one size; each network gets its own.

        Raises:
            UserError: an image cannot be read.
        """
        for index, network in enumerate(self._networks):
            parameter = next(network.parameters())
            images = torch.stack([read_guide(request.guides[index], (request.width, request.height)) for request in requests])
            network.see(images.to(parameter.device, parameter.dtype))

    def before_step(self, step: int, num_steps: int) -> None:
        """Switch on what acts in a step and off what does not any more.

        Args:
            step: from 0.
            num_steps: in all.
        """
        for network, file in zip(self._networks, self._files, strict=True):
            network.set_multiplier(file.multiplier if step / num_steps <= file.ratio else 0.0)

    def end(self) -> None:
        """Forget the guide images."""
        for network in self._networks:
            network.see(None)


def read_guide(path: str, size: tuple[int, int]) -> Tensor:
    """Read an image as a control network wants it: (3, height, width) float32 in [-1, 1], resized with Lanczos.

    Args:
        path: of the image.
        size: width and height in pixels.

    Raises:
        UserError: it cannot be read.
    """
    teach_pillow(path)
    try:
        with Image.open(path) as image:
            picture: Any = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"The guide image {path} cannot be read ({error}). Is it an image? Save it again as PNG.") from error
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
