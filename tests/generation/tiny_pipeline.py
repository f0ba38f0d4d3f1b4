"""What the tests of generation share beside fixtures."""

import numpy as np
import torch
from PIL import Image

from library.models.family import Components
from library.models.sdxl.family import SdxlFamily

CPU = torch.device("cpu")


def load_components(family: SdxlFamily) -> Components:
    """Load the whole model in float32."""
    return Components(
        family.load_denoiser(torch.float32, CPU),
        family.load_vae(torch.float32, CPU),
        [*family.load_text_encoders(torch.float32, CPU)],
    )


def difference(left: Image.Image, right: Image.Image) -> float:
    """Mean absolute difference in levels of 255."""
    return float(np.abs(np.asarray(left, dtype=np.float32) - np.asarray(right, dtype=np.float32)).mean())
