"""Draw the edges of pictures, white on black: control images for ControlNet-LLLite.

    python tools/canny.py --input photo.jpg --output edges.png
    python tools/canny.py --input pictures --output edges            # a folder: edges/photo.png for each pictures/photo.jpg
    python tools/canny.py --input photo.jpg --output edges.png --thres1 100 --thres2 200

The method is Canny's (1986) on the grey picture. A place whose gradient is above --thres2 is an edge, one above --thres1 belongs to
an edge it touches: higher numbers give fewer lines. Pictures are set upright first, as training does.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the project's folder is not on the path

from library.dataset.formats import is_image_name, list_images, teach_pillow, without_package
from library.files.atomic import atomic_write, make_folder
from library.options.console import say
from library.options.entry import run_script
from library.options.errors import UsageError, UserError

_NEEDED = {"input": "a picture, or a folder of pictures", "output": "the picture to write, or a folder for them"}


def main(argv: Sequence[str]) -> None:
    """Draw the edges of the picture, or of all pictures of the folder, that the command line names.

    Raises:
        UsageError: the command line cannot be used; nothing was written then.
        UserError: pictures cannot be read; all others are done.
    """
    arguments = read_command_line(argv)
    source, target = Path(arguments.input), Path(arguments.output)
    pairs = [(source, target)]
    if source.is_dir():
        pairs = [(Path(path), target / f"{Path(path).stem}.png") for path in list_images(str(source))]
    make_folder(target if source.is_dir() else target.parent)
    problems = []
    for picture, edges in pairs:
        try:
            draw_edges(picture, edges, arguments.thres1, arguments.thres2)
        except UserError as error:
            problems.append(str(error))
    say(f"{len(pairs) - len(problems)} of {len(pairs)} pictures done.")
    if problems:
        raise UserError("\n".join(problems))


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", help="a picture, or a folder of them")
    parser.add_argument("--output", help="the picture of edges to write, or a folder for them")
    parser.add_argument("--thres1", type=int, default=32, help="lower threshold (%(default)s)")
    parser.add_argument("--thres2", type=int, default=224, help="upper threshold (%(default)s)")
    return parser


def read_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """Return what was asked for.

    Raises:
        UsageError: with everything that is wrong.
    """
    arguments = command_line().parse_args(argv)
    if missing := [f"--{name} is missing: give {what}." for name, what in _NEEDED.items() if getattr(arguments, name) is None]:
        raise UsageError(missing)
    source, target = Path(arguments.input), Path(arguments.output)
    problems = []
    if not source.exists():
        problems.append(f"--input {source}: there is no file or folder of that name; check the path.")
    elif source.is_dir() and target.is_file():
        problems.append(f"--output {target} is a file, and --input is a folder; give a folder for the edges of its pictures.")
    elif not source.is_dir() and not is_image_name(target.name):
        problems.append(f"--output {target} must end in .png or the ending of another image format.")
    elif not source.is_dir():
        problems += [f"--output {target} would be {which}" for which in without_package([str(target)])]
    if source.exists() and target.exists() and source.samefile(target):
        problems.append("--input and --output are the same, and the pictures would be lost; give another --output.")
    if problems:
        raise UsageError(problems)
    return arguments


def draw_edges(picture: Path, edges: Path, low: int, high: int) -> None:
    """Write the edges of a picture, white (255) on black.

    Args:
        picture: to read.
        edges: to write; its ending decides the format.
        low: gradient above which a place belongs to an edge it touches.
        high: gradient above which a place is an edge.

    Raises:
        UserError: the picture cannot be read, or the edges cannot be written.
    """
    import cv2
    import numpy as np
    from PIL import Image, ImageOps

    teach_pillow(str(picture))
    try:
        with Image.open(picture) as image:
            grey = np.asarray(ImageOps.exif_transpose(image).convert("RGB").convert("L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{picture} cannot be read ({error}). Is it a picture? Save it again as PNG.") from error
    lines = Image.fromarray(cv2.Canny(grey, low, high))
    with atomic_write(edges) as unfinished:
        lines.save(unfinished, format=Image.registered_extensions()[edges.suffix.lower()])


if __name__ == "__main__":
    run_script(main)
