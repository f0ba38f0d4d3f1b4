"""Print what a model or LoRA file says of itself: how it was trained, on what, and what its author wrote.

    python tools/show_metadata.py --model my_lora.safetensors
    python tools/show_metadata.py --model sdxl.ckpt --raw

The metadata comes as JSON, sorted by name. Values that are JSON themselves, such as tag frequencies, are unfolded; --raw leaves
them the texts they are. A .ckpt file tells its metadata, epoch and step where whoever wrote it noted them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the project's folder is not on the path

from library.files.safetensors_header import parse_header
from library.options.console import say
from library.options.entry import run_script
from library.options.errors import UserError

PICKLE_ENDINGS = (".ckpt", ".pt", ".pth", ".bin")


def main(argv: Sequence[str]) -> None:
    """Print the metadata of the file that the command line names.

    Raises:
        UserError: the file cannot be read or has no metadata.
    """
    arguments = command_line().parse_args(argv)
    metadata = read_metadata(Path(arguments.model))
    if not metadata:
        raise UserError(f"{arguments.model} has no metadata: whoever wrote it noted nothing about it.")
    shown = metadata if arguments.raw else {key: unfolded(value) for key, value in metadata.items()}
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    say(json.dumps(shown, indent=4, sort_keys=True, ensure_ascii=not is_unicode))


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the file, .safetensors or .ckpt")
    parser.add_argument("--raw", action="store_true", help="leave values that are JSON the texts they are")
    return parser


def read_metadata(path: Path) -> dict[str, str]:
    """Return a file's metadata; no tensor is read, and of a .safetensors file only the beginning.

    Raises:
        UserError: the file is missing, damaged or something else.
    """
    if path.suffix.lower() not in PICKLE_ENDINGS:
        return parse_header(path).metadata
    from library.files.pickle_io import load_pickle_checkpoint, metadata_of

    return metadata_of(load_pickle_checkpoint(path))


def unfolded(value: str) -> Any:
    """Return the object or list that a text holds as JSON, or the text itself; a number stays the text it is in the file."""
    if not value.startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


if __name__ == "__main__":
    run_script(main)
