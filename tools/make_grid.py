"""Put folders of pictures into one PNG, one labelled row per folder, to compare them at a glance.

    python tools/make_grid.py before_after.png before=outputs/a after=outputs/b

Pictures stand in the order of their file names, at their own size.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the project's folder is not on the path

from library.files.atomic import atomic_write
from library.options.entry import run_script
from library.options.errors import UserError

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
LABEL_HEIGHT = 28
GAP = 4


def read_row(spec: str) -> tuple[str, list[Image.Image]]:
    """Read `LABEL=FOLDER`: the label, and the folder's pictures in the order of their names.

    Raises:
        UserError: the text has no `=`, the folder does not exist or holds no pictures.
    """
    label, separator, folder = spec.partition("=")
    if not separator:
        raise UserError(f"A row is written LABEL=FOLDER; received “{spec}”. For example: before=outputs/before")
    if not Path(folder).is_dir():
        raise UserError(f"There is no folder {folder} (for the row “{label}”).")
    files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise UserError(f"The folder {folder} (for the row “{label}”) holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}).")
    return label, [Image.open(path).convert("RGB") for path in files]


def make_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Return one RGB picture: every row under its label, every column as wide as the widest picture."""
    pictures = [picture for _, row in rows for picture in row]
    cell_width, cell_height = max(p.width for p in pictures) + GAP, max(p.height for p in pictures) + GAP
    columns = max(len(row) for _, row in rows)
    grid = Image.new("RGB", (columns * cell_width - GAP, len(rows) * (LABEL_HEIGHT + cell_height) - GAP), "white")
    canvas = ImageDraw.Draw(grid)
    for number, (label, row) in enumerate(rows):
        top = number * (LABEL_HEIGHT + cell_height)
        canvas.text((GAP, top + GAP), label, fill="black", font=ImageFont.load_default(18))
        for column, picture in enumerate(row):
            grid.paste(picture, (column * cell_width, top + LABEL_HEIGHT))
    return grid


def main(argv: Sequence[str]) -> None:
    """Read the command line and write the grid."""
    parser = argparse.ArgumentParser(description="Put folders of pictures into one PNG, one labelled row per folder.")
    parser.add_argument("output", help="the PNG file to write")
    parser.add_argument("rows", nargs="+", metavar="LABEL=FOLDER", help="one row of the grid, top to bottom")
    arguments = parser.parse_args(argv)
    grid = make_grid([read_row(spec) for spec in arguments.rows])
    with atomic_write(arguments.output) as temporary:
        grid.save(temporary, format="PNG")


if __name__ == "__main__":
    run_script(main)
