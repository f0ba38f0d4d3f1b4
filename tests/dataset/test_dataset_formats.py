"""Which files count as pictures, and what happens where a package for a format is missing."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from dataset_samples import config, make_image, section, subset
from PIL import Image, features

from library.dataset import formats
from library.dataset.findings import Findings, Kind, Severity
from library.dataset.formats import IMAGE_EXTENSIONS, is_image_name, list_images, without_package
from library.dataset.images import inspect_image, read_pixels
from library.dataset.index import build_index
from library.options.errors import UserError


@pytest.fixture
def nothing_known() -> Iterator[None]:
    """What was found out about packages is forgotten before and after."""
    formats._can_read.cache_clear()
    yield
    formats._can_read.cache_clear()


def test_images_lie_directly_in_the_folder_in_sorted_order(tmp_path: Path) -> None:
    for name in ["b.png", "a.JPG", "c.webp", "d.bmp", ".hidden.png"]:
        make_image(tmp_path / name, (8, 8))
    for name in ["e.Png", "f.gif", "g.png.txt", "h.jXl", "i.AVIF", "j.Jpeg", "png"]:
        (tmp_path / name).touch()
    (tmp_path / "deeper").mkdir()
    make_image(tmp_path / "deeper" / "k.png")
    (tmp_path / "folder.png").mkdir()
    names = [Path(path).name for path in list_images(str(tmp_path))]
    assert names == ["a.JPG", "b.png", "c.webp", "d.bmp", "e.Png", "h.jXl", "i.AVIF", "j.Jpeg"]


@pytest.mark.parametrize("ending", IMAGE_EXTENSIONS)
def test_every_spelling_of_an_ending_counts(ending: str) -> None:
    assert is_image_name(f"a{ending}")
    assert is_image_name(f"a{ending.upper()}")
    assert is_image_name(f"a{ending.title()}")
    assert not is_image_name(f".a{ending}")


@pytest.mark.usefixtures("nothing_known")
def test_pictures_that_need_a_missing_package_are_counted_in_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x.jxl", "y.JXL", "z.Jxl"):
        (folder / name).write_bytes(b"\xff\x0a and so on")
    for module in ("pillow_jxl", "jxlpy"):
        monkeypatch.setitem(sys.modules, module, None)  # import_module then fails
    findings = Findings()
    (built,) = build_index(config(section(subset(folder))), findings)
    ((kind, count, (problem,)),) = findings.groups(Severity.ERROR)
    assert (kind, count) == (Kind.FORMAT, 3)
    assert problem.sentence == "x.jxl, y.JXL, z.Jxl are JPEG XL, which needs another package: pip install pillow-jxl-plugin."
    assert len(built.items) == 5


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("module", ["pillow_jxl", "jxlpy.JXLImagePlugin"])
def test_either_package_reads_jpeg_xl(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pillow_jxl", "jxlpy", "jxlpy.JXLImagePlugin"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name) if module.startswith(name) else None)
    assert without_package(["a.jxl", "b.JXL"]) == {}


def test_jpeg_xl_is_read_where_there_is_a_package(tmp_path: Path) -> None:
    pytest.importorskip("pillow_jxl")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jxl", lossless=True)
    assert inspect_image(str(tmp_path / "a.jxl")).size == (50, 30)
    np.testing.assert_array_equal(read_pixels(str(tmp_path / "a.jxl")), pixels)
    content = (tmp_path / "a.jxl").read_bytes()
    (tmp_path / "b.jxl").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"b\.jxl"):
        inspect_image(str(tmp_path / "b.jxl"))


def test_what_a_plug_in_raises_over_a_damaged_file_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: str) -> None:
        raise RuntimeError("Generic Error. Please build the library from source.")

    monkeypatch.setattr(Image, "open", fails)
    (tmp_path / "a.png").write_bytes(b"something")
    for read in (inspect_image, read_pixels):
        with pytest.raises(UserError, match=r"a\.png cannot be read: it is damaged or cut off\."):
            read(str(tmp_path / "a.png"))


@pytest.mark.usefixtures("nothing_known")
def test_avif_needs_a_package_where_pillow_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert features.check("avif") is (without_package(["a.avif"]) == {})
    formats._can_read.cache_clear()
    monkeypatch.setattr(features, "check", lambda name: False)
    monkeypatch.setitem(sys.modules, "pillow_avif", None)
    assert without_package(["a.avif", "b.png"]) == {"AVIF, which needs another package: pip install pillow-avif-plugin": ["a.avif"]}
    formats._can_read.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_avif", ModuleType("pillow_avif"))
    assert without_package(["a.avif"]) == {}
