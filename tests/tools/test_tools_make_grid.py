"""tools/make_grid.py: what stands where in the grid, and what it says to wrong input."""

from pathlib import Path

import pytest
from PIL import Image

from library.options.errors import UserError
from tools import make_grid


def folder_of(path: Path, *colours: str) -> Path:
    path.mkdir()
    for number, colour in enumerate(colours):
        Image.new("RGB", (40, 30), colour).save(path / f"im_{number:06d}.png")
    return path


def test_rows_stand_under_each_other_and_pictures_in_the_order_of_their_names(tmp_path: Path) -> None:
    before, after = folder_of(tmp_path / "a", "red", "lime"), folder_of(tmp_path / "b", "blue", "yellow")
    make_grid.main([str(tmp_path / "out" / "grid.png"), f"before={before}", f"after={after}"])
    grid = Image.open(tmp_path / "out" / "grid.png")
    row = make_grid.LABEL_HEIGHT + 30 + make_grid.GAP
    column = 40 + make_grid.GAP
    corners = [(0, make_grid.LABEL_HEIGHT), (column, make_grid.LABEL_HEIGHT)]
    corners += [(x, y + row) for x, y in corners]
    assert [grid.getpixel(corner) for corner in corners] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    assert grid.size == (2 * column - make_grid.GAP, 2 * row - make_grid.GAP)


def test_the_label_is_drawn_above_its_row() -> None:
    grid = make_grid.make_grid([("before", [Image.new("RGB", (80, 30))])])
    label = grid.crop((0, 0, 80, make_grid.LABEL_HEIGHT)).convert("L")
    assert label.getextrema()[0] < 100


@pytest.mark.parametrize(
    ("row", "sentence"),
    [("before", "LABEL=FOLDER; received “before”"), ("a=nowhere", "no folder nowhere"), ("a={empty}", "holds no pictures")],
)
def test_wrong_rows_are_named(row: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        make_grid.read_row(row.format(empty=tmp_path))
