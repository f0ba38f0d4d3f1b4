"""Turn an SDXL checkpoint file into a diffusers folder, or a folder into a file; every tensor stays as it is.

    python tools/convert_sdxl.py sdxl.safetensors sdxl_folder
    python tools/convert_sdxl.py sdxl_folder again.safetensors
    python tools/convert_sdxl.py sdxl.safetensors half.safetensors --save_precision fp16
    python tools/convert_sdxl.py sdxl.ckpt sdxl_folder --bin

The output's name decides: `.safetensors` and `.ckpt` are files, a name without ending is a folder. What a file says of itself, and
OpenCLIP's logit scale, for which diffusers has no place, wait in the folder's single_file.json for the way back.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the project's folder is not on the path

from library.options.entry import run_script
from library.options.errors import UsageError
from library.training.outputs import is_foreign_folder

_LAYOUTS = {".safetensors": "safetensors", ".ckpt": "ckpt"}
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "float": "float32"}


def main(argv: Sequence[str]) -> None:
    """Convert what the command line names.

    Raises:
        UsageError: a path cannot be used; torch has not been imported then.
        UserError: the source is no complete SDXL model, the disk is full, or the output's folder is not writable.
    """
    arguments = command_line().parse_args(argv)
    layout = output_layout(arguments)
    convert(arguments.source, arguments.out, layout, _DTYPES.get(arguments.save_precision), arguments.vae)


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="an SDXL checkpoint (.safetensors, .ckpt) or a diffusers folder")
    parser.add_argument("out", type=Path, help="the file (.safetensors, .ckpt) or folder to make")
    parser.add_argument("--bin", action="store_true", help="write .bin files into the folder instead of .safetensors")
    parser.add_argument("--save_precision", choices=_DTYPES, help="number type of the weights; as they are when left out")
    parser.add_argument("--vae", help="a VAE that replaces the model's own: a file or a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser


def output_layout(arguments: argparse.Namespace) -> str:
    """Return the layout that the output's name asks for, as `Family.save_model` knows it.

    Raises:
        UsageError: with everything that is wrong with the paths.
    """
    source, out = arguments.source, arguments.out
    problems = []
    if not source.exists():
        problems.append(f"There is no file or folder {source}. Name an SDXL checkpoint or a diffusers folder.")
    if out.exists() and not arguments.overwrite:
        problems.append(f"{out} exists already. Choose another name, or replace it with --overwrite.")
    if out.exists() and source.exists() and out.resolve() == source.resolve():
        problems.append(f"{out} is the source itself. Choose another name.")
    layout = _LAYOUTS.get(out.suffix.lower())
    if layout is None and (out.suffix.lower() in (".pt", ".pth", ".bin", ".sft") or out.is_file()):
        problems.append(f"{out} should end in .safetensors or .ckpt for a file, or have no ending for a folder.")
    if layout is not None and arguments.bin:
        problems.append(f"--bin is for folders, but {out} is a file. Leave it out.")
    if layout is not None and out.is_dir():
        problems.append(f"{out} is a folder. Remove it, or choose another name for the file.")
    if layout is None and arguments.overwrite and out.is_dir() and is_foreign_folder(out):
        problems.append(f"{out} is a folder of something else (it has no model_index.json). Choose another name.")
    if problems:
        raise UsageError(problems)
    return layout or ("diffusers" if arguments.bin else "diffusers_safetensors")


def convert(source: Path, out: Path, layout: str, dtype_name: str | None, vae: str | None) -> None:
    """Write a model in another layout.

    Args:
        source: file or folder.
        out: file or folder to make or replace.
        layout: of the output, see `Family.save_model`.
        dtype_name: torch's name of the number type, or None to keep every tensor's own.
        vae: file or folder of a VAE that replaces the model's own.

    Raises:
        UserError: the source is no complete SDXL model, or the output cannot be written.
    """
    import torch

    from library.models.family import ModelSource
    from library.models.sdxl.family import SdxlFamily
    from library.models.sdxl.save_model import save_model, stored_model

    family = SdxlFamily.open(ModelSource(str(source), vae))
    checkpoint = family.checkpoint
    save_model(
        out,
        layout,
        stored_model(checkpoint, {}, checkpoint.markers),
        family.sizes,
        dtype=None if dtype_name is None else getattr(torch, dtype_name),
        metadata={key: value for key, value in checkpoint.metadata.items() if key not in ("epoch", "global_step")},
    )
    sys.stdout.write(f"Wrote {out}\n")


if __name__ == "__main__":
    run_script(main)
