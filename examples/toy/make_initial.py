"""Write the toy's checkpoint before training: the trained VAE, and everything else with random weights as training starts from.

python examples/toy/make_initial.py vae.safetensors initial.safetensors
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from library.files.safetensors_io import open_safetensors, save_safetensors  # noqa: E402
from library.models.sdxl.build import build_parts, part_tensors  # noqa: E402
from library.models.sdxl.single_file import single_file_tensors  # noqa: E402
from library.models.sdxl.sizes import SdxlSizes, TextEncoderSizes, VaeSizes, plan_unet  # noqa: E402

NORM_GROUPS = 16
VAE_NORM_GROUPS = 8
WIDTHS = (32, 64)
"""Of the text encoders."""
SIZE_DIM = 8
"""Width of one size number's embedding."""


def main(argv: Sequence[str]) -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vae", type=Path, metavar="VAE.safetensors", help="what train_vae.py made")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="the file to make")
    parser.add_argument("--seed", type=int, default=2, help="of the random weights (2)")
    arguments = parser.parse_args(argv)
    vae = open_safetensors(arguments.vae)
    metadata = {
        "format": "pt",
        "arch.norm_groups": str(NORM_GROUPS),
        "arch.vae.norm_groups": str(VAE_NORM_GROUPS),
        "arch.vae.scaling_factor": vae.metadata["scaling_factor"],
    }
    torch.manual_seed(arguments.seed)
    parts: dict[str, dict[str, Tensor]] = {
        part: {name: initial_value(part, name, tuple(tensor.shape)) for name, tensor in part_tensors(module).items()}
        for part, module in build_parts(toy_sizes()).items()
    }
    parts["vae"] = dict(vae)
    save_safetensors(arguments.out, single_file_tensors(parts), metadata)


def toy_sizes() -> SdxlSizes:
    """Return the sizes of the toy: the layout of SDXL with three levels, small enough to be trained on a CPU within the hour."""
    context = sum(WIDTHS)
    return SdxlSizes(
        unet=plan_unet(64, (1, 2, 2), (0, 1, 1), residual_blocks=1, context_dim=context, vector_dim=WIDTHS[1] + 6 * SIZE_DIM),
        te1=TextEncoderSizes.by_convention(WIDTHS[0], 3, "quick_gelu"),
        te2=TextEncoderSizes.by_convention(WIDTHS[1], 3, "gelu", projection_dim=WIDTHS[1]),
        vae=VaeSizes((32, 32, 64, 64), 1, 4, norm_groups=VAE_NORM_GROUPS),
    )


def initial_value(part: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """Draw one tensor.

    Matrices and kernels are uniform with variance 1 / (3 · inputs), as PyTorch's own layers start; biases are 0, norms neither
    scale nor shift, and the last layer of every residual branch of the U-Net is 0, so that it begins as an identity (Ho et al.
    2020).

    Embeddings are normal with a larger deviation than CLIP's 0.02, since few steps must be enough to tell words apart.
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    if part == "unet" and re.search(r"(out_layers\.3|proj_out|^out\.2)\.weight$", name):
        return torch.zeros(shape)
    if "embedding" in name:
        return torch.randn(shape) * (0.5 if "token" in name else 0.1)
    bound = math.prod(shape[1:]) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound)


if __name__ == "__main__":
    main(sys.argv[1:])
