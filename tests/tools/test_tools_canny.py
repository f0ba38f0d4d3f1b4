"""Edges of pictures, against OpenCV on the plain grey picture."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from library.options.errors import UsageError, UserError
from tools.canny import main


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    image = Image.new("RGB", (60, 40), (30, 60, 90))
    ImageDraw.Draw(image).rectangle((10, 10, 30, 25), fill=(200, 180, 20))
    image.save(folder / "a.png")
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    turned.save(folder / "é b.jpg", quality=100, subsampling=0, exif=exif)
    return folder


def test_edges_are_white_on_black_and_upright(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main(["--input", str(pictures), "--output", str(out)])
    assert "2 of 2 pictures done" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "é b.png"]
    found = np.asarray(Image.open(out / "a.png"))
    grey = np.asarray(Image.open(pictures / "a.png").convert("L"))
    assert np.array_equal(found, cv2.Canny(grey, 32, 224))
    assert set(np.unique(found)) == {0, 255}
    assert found[18, 9:12].any() and not found[18, 15:25].any(), "the rectangle's border, not its inside"
    assert Image.open(out / "é b.png").size == (60, 40)


def test_thresholds_decide_what_is_an_edge(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "few.png"
    main(["--input", str(pictures / "a.png"), "--output", str(out), "--thres1", "5000", "--thres2", "6000"])
    assert not np.asarray(Image.open(out)).any()


def test_a_broken_picture_is_named_and_the_others_are_done(pictures: Path, tmp_path: Path) -> None:
    (pictures / "c.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"c\.png cannot be read"):
        main(["--input", str(pictures), "--output", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--input is missing.*--output is missing"),
        (["--input", "nowhere.png", "--output", "x.png"], "nowhere.png: there is no file or folder"),
        (["--input", "in/a.png", "--output", "edges"], "must end in .png"),
        (["--input", "in/a.png", "--output", "edges.jxl"], "edges.jxl would be JPEG XL, which needs another package"),
        (["--input", "in", "--output", "in"], "are the same"),
        (["--input", "in", "--output", "in/a.png"], "is a file, and --input is a folder"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], told: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.dataset.formats._can_read", lambda ending: ending != ".jxl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"(?s){told}"):
        main(arguments)
