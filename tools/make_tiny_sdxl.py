"""Write an SDXL checkpoint with random weights: small by default, for tests and demos; `--full` has the real sizes, for benchmarks.

    python tools/make_tiny_sdxl.py tiny.safetensors
    python tools/make_tiny_sdxl.py wide.safetensors --model_channels 128 --depth 0,1,1 --dtype fp32
    python tools/make_tiny_sdxl.py full.safetensors --full

The file has the layout of Stability's release. Every layer that training from scratch would start at zero is small instead, so that
outputs and gradients depend on all weights.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.models.sdxl.sizes import SdxlSizes, TextEncoderSizes, VaeSizes, plan_unet
from library.options.errors import UsageError

if TYPE_CHECKING:
    import torch

_DEFAULTS = {
    "model_channels": [64],
    "channel_mult": [1, 1, 2],
    "depth": [0, 1, 2],
    "te_widths": [64, 128],
    "te_layers": [3, 3],
    "vae_channels": [32],
}
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
_SIZE_DIM = 8
"""Width of one size number's embedding in small checkpoints (256 in SDXL)."""


def main(argv: Sequence[str]) -> None:
    """Write the checkpoint that the command line describes.

    Raises:
        UsageError: a size or path cannot be used; torch has not been imported then.
        UserError: the disk is full or the folder not writable.
    """
    arguments = _parser().parse_args(argv)
    sizes = _read_sizes(arguments)
    _write(Path(arguments.out), sizes, arguments.seed, _DTYPES[arguments.dtype])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT.safetensors", help="the file to make")
    parser.add_argument("--model_channels", metavar="N", help="width of the U-Net's first level, a multiple of 32 from 64 on (64)")
    parser.add_argument("--channel_mult", metavar="N,N,…", help="width of each U-Net level as a multiple of it (1,1,2)")
    parser.add_argument("--depth", metavar="N,N,…", help="transformer blocks per level; 0 for none (0,1,2)")
    parser.add_argument("--te_widths", metavar="N,N", help="widths of the two text encoders, different multiples of 32 (64,128)")
    parser.add_argument("--te_layers", metavar="N,N", help="layers of the two text encoders, at least 2 (3,3)")
    parser.add_argument("--vae_channels", metavar="N", help="width of the VAE's first level, a multiple of 32 (32)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (0)")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp16", help="of the weights (fp16)")
    parser.add_argument("--full", action="store_true", help="real SDXL sizes: 6.9 GB in fp16; excludes the options for sizes")
    return parser


def _read_sizes(arguments: argparse.Namespace) -> SdxlSizes:
    """Return the sizes asked for.

    Raises:
        UsageError: with everything that is wrong.
    """
    given = {name: getattr(arguments, name) for name in _DEFAULTS if getattr(arguments, name) is not None}
    problems = _path_problems(Path(arguments.out))
    if arguments.full:
        problems += [f"--{name} does not go with --full, which has SDXL's own sizes. Leave one out." for name in given]
        if problems:
            raise UsageError(problems)
        return SdxlSizes()
    numbers = dict(_DEFAULTS)
    for name, text in given.items():
        try:
            numbers[name] = [int(number) for number in text.split(",")]
        except ValueError:
            problems.append(f"--{name} {text}: whole numbers are wanted, separated by commas, like {_example(name)}.")
    problems += _size_problems(numbers)
    if problems:
        raise UsageError(problems)
    return _tiny_sizes(numbers)


def _path_problems(out: Path) -> list[str]:
    if out.suffix.lower() != ".safetensors":
        return [f"{out}: the file's name must end in .safetensors."]
    if not out.resolve().parent.is_dir():
        return [f"{out}: there is no folder {out.resolve().parent}. Make it first."]
    return []


def _size_problems(numbers: dict[str, list[int]]) -> list[str]:
    """Check the numbers; one sentence for each that cannot be used."""
    counts = {"model_channels": 1, "vae_channels": 1, "te_widths": 2, "te_layers": 2, "depth": len(numbers["channel_mult"])}
    least = {"model_channels": 64, "vae_channels": 32, "te_widths": 32, "te_layers": 2, "depth": 0, "channel_mult": 1}
    steps = {"model_channels": 32, "vae_channels": 32, "te_widths": 32}
    problems = []
    for name, values in numbers.items():
        got = f"--{name} {','.join(map(str, values))}"
        if len(values) != counts.get(name, len(values)):
            as_many = ", as many as --channel_mult has" if name == "depth" else ""
            problems.append(f"{got}: {counts[name]} numbers are wanted{as_many}, like {_example(name)}.")
        elif min(values) < least[name]:
            problems.append(f"{got}: {min(values)} is too small; the least is {least[name]}.")
        elif any(value % steps.get(name, 1) for value in values):
            problems.append(f"{got}: multiples of {steps[name]} are wanted, since norms have 32 groups.")
    if not any(numbers["depth"]):
        problems.append("--depth has only zeros: a U-Net without any transformer would not see the text. Give one level a depth.")
    if len(set(numbers["te_widths"])) == 1:
        problems.append("--te_widths are equal: other programs tell the two text encoders apart by their widths. Make them differ.")
    return problems


def _example(name: str) -> str:
    return ",".join(map(str, _DEFAULTS[name]))


def _tiny_sizes(numbers: dict[str, list[int]]) -> SdxlSizes:
    (channels,), (vae_width,) = numbers["model_channels"], numbers["vae_channels"]
    (width1, width2), (layers1, layers2) = numbers["te_widths"], numbers["te_layers"]
    vector_dim = width2 + 6 * _SIZE_DIM
    return SdxlSizes(
        unet=plan_unet(channels, numbers["channel_mult"], numbers["depth"], width1 + width2, vector_dim),
        te1=TextEncoderSizes.by_convention(width1, layers1, "quick_gelu"),
        te2=TextEncoderSizes.by_convention(width2, layers2, "gelu", projection_dim=width2),
        vae=VaeSizes(tuple(vae_width * times for times in (1, 2, 4, 4)), 2, 4),
    )


def _write(path: Path, sizes: SdxlSizes, seed: int, dtype_name: str) -> None:
    import torch

    from library.files.safetensors_io import save_safetensors
    from library.models.sdxl.build import build_parts, part_tensors
    from library.models.sdxl.single_file import single_file_tensors

    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, dtype_name)
    parts = {
        part: {name: _random(name, tuple(tensor.shape), generator).to(dtype) for name, tensor in part_tensors(module).items()}
        for part, module in build_parts(sizes).items()
    }
    save_safetensors(path, single_file_tensors(parts), {"format": "pt"})
    elements = sum(tensor.numel() for part in parts.values() for tensor in part.values())
    sys.stdout.write(f"{path}: {elements:,} random weights, {path.stat().st_size:,} bytes\n")


def _random(name: str, shape: tuple[int, ...], generator: "torch.Generator") -> "torch.Tensor":
    """Draw one tensor so that activations keep their scale: matrices by fan-in, norm weights near 1, biases near 0."""
    import torch

    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        fan_in = 2500 if "embedding" in name else values[0].numel()
        return values.mul_(fan_in**-0.5)
    return values.mul_(0.02).add_(1.0 if name.endswith("weight") else 0.0)


if __name__ == "__main__":
    from library.options.entry import run_script

    run_script(main)
