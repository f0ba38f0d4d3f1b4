"""Draw the pictures of a batch side by side, each with its mask, its control image and what is said of it."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from library.dataset.batch import Batch

_MAX_SIDE = 512
"""Longest side of a picture on the sheet, in pixels; smaller ones keep their size."""
_MIN_WIDTH = 160
_SHEET_WIDTH = 2048
_MARGIN, _LINE, _LINES, _TEXT_SIZE = 8, 14, 6, 12
_PAPER, _INK = (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True)
class _Cell:
    pictures: list[Image.Image]
    lines: list[str]


def contact_sheet(batch: Batch, titles: Sequence[str]) -> Image.Image:
    """Return a picture of a batch that holds images, in the order of the batch.

    Args:
        batch: on the CPU.
        titles: of the images; their captions follow below, as far as there is room.
    """
    cells = [_cell(batch, position, title) for position, title in enumerate(titles)]
    width = max(_cell_width(cell) for cell in cells)
    height = max(picture.height for cell in cells for picture in cell.pictures) + 3 * _MARGIN + _LINES * _LINE
    columns = max(1, min(len(cells), _SHEET_WIDTH // width))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), _PAPER)
    for position, cell in enumerate(cells):
        _draw(sheet, cell, position % columns * width, position // columns * height)
    return sheet


def to_picture(values: Tensor) -> Image.Image:
    """Turn (3, H, W) in [-1, 1], or a mask (H, W) in [0, 1], into a picture."""
    array = values.float().numpy()
    scaled = array if array.ndim == 2 else (array.transpose(1, 2, 0) + 1) / 2
    return Image.fromarray(np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)).convert("RGB")


def _cell(batch: Batch, position: int, title: str) -> _Cell:
    parts = [part[position] for part in (batch.images, batch.masks, batch.conditioning) if part is not None]
    pictures = [_small(to_picture(part)) for part in parts]
    width = max(_MIN_WIDTH, sum(picture.width for picture in pictures))
    wrapped = [line for text in (title, batch.captions[position]) for line in textwrap.wrap(text, width // 7)]
    lines = wrapped if len(wrapped) <= _LINES else [*wrapped[: _LINES - 1], f"{wrapped[_LINES - 1]} …"]
    return _Cell(pictures, lines)


def _small(picture: Image.Image) -> Image.Image:
    picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
    return picture


def _cell_width(cell: _Cell) -> int:
    return max(_MIN_WIDTH, sum(picture.width + _MARGIN for picture in cell.pictures)) + _MARGIN


def _draw(sheet: Image.Image, cell: _Cell, left: int, top: int) -> None:
    x = left + _MARGIN
    for picture in cell.pictures:
        sheet.paste(picture, (x, top + _MARGIN))
        x += picture.width + _MARGIN
    below = top + 2 * _MARGIN + max(picture.height for picture in cell.pictures)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT_SIZE)
    for number, line in enumerate(cell.lines):
        draw.text((left + _MARGIN, below + number * _LINE), line, fill=_INK, font=font)
