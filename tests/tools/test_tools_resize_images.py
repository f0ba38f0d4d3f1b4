"""Shrinking folders of pictures: sizes, what is kept, what is copied, what is wrong."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from library.options.errors import UsageError, UserError
from tools.resize_images_to_resolution import main, shrunk_and_cut


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right from 0 to 255, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x + 128], axis=-1).round().astype(np.uint8))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "made" / "target"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("size", "bound", "divisor", "expected"),
    [
        ((600, 300), (200, 200), 1, ((282, 141), (282, 141))),
        ((600, 300), (200, 200), 8, ((282, 141), (280, 136))),
        ((300, 600), (400, 100), 1, ((141, 282), (141, 282))),
        ((900, 900), (300, 300), 1, ((300, 300), (300, 300))),
        ((200, 200), (200, 200), 1, ((200, 200), (200, 200))),
        ((100, 50), (512, 512), 1, ((100, 50), (100, 50))),
        ((100, 50), (512, 512), 32, ((100, 50), (96, 32))),
        ((30000, 2), (128, 128), 1, ((15676, 1), (15676, 1))),
    ],
)
def test_pictures_shrink_in_proportion_to_the_number_of_pixels(
    size: tuple[int, int], bound: tuple[int, int], divisor: int, expected: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    assert shrunk_and_cut(size, bound, divisor) == expected


def test_every_size_of_every_picture_is_written(source: Path, target: Path) -> None:
    gradient(600, 300).save(source / "wide.png")
    gradient(90, 150).save(source / "tall.BMP")
    main([str(source), str(target), "--max_resolution", "200x200,100x100"])
    sizes = {name: Image.open(target / name).size for name in names(target)}
    assert sizes == {
        "wide+200x200.jpg": (282, 141),
        "wide+100x100.jpg": (141, 70),
        "tall+200x200.jpg": (90, 150),
        "tall+100x100.jpg": (77, 129),
    }
    assert names(source) == ["tall.BMP", "wide.png"]


def test_the_sizes_of_sd_scripts_are_taken_when_none_are_given(source: Path, target: Path) -> None:
    gradient(1000, 800).save(source / "a.webp", lossless=True)
    main([str(source), str(target)])
    assert names(target) == [f"a+{side}x{side}.jpg" for side in (128, 256, 384, 512)]


def test_the_middle_is_kept_undistorted(source: Path, target: Path) -> None:
    gradient(640, 320).save(source / "a.png")
    main([str(source), str(target), "--max_resolution", "200x200", "--divisible_by", "64", "--save_as_png"])
    made = np.asarray(Image.open(target / "a+200x200.png")).astype(float)
    assert made.shape == (128, 256, 3)
    left = (282 - 256) / 2
    columns, rows = (np.arange(256) + left + 0.5) / 282 * 255, (np.arange(128) + 6.5) / 141 * 255
    assert np.abs(made[..., 0] - columns).max() < 2
    assert np.abs(made[..., 1] - rows[:, None]).max() < 2.5


def test_each_size_is_made_from_the_original(source: Path, target: Path) -> None:
    gradient(500, 300).save(source / "a.png")
    main([str(source), str(target), "--max_resolution", "64x64,300x300", "--save_as_png"])
    main([str(source), str(target / "alone"), "--max_resolution", "300x300", "--save_as_png"])
    assert (target / "a+300x300.png").read_bytes() == (target / "alone" / "a+300x300.png").read_bytes()


def test_jpeg_is_of_the_best_quality_and_png_exact(source: Path, target: Path) -> None:
    gradient(96, 96).save(source / "a.png")
    main([str(source), str(target)])
    assert set(Image.open(target / "a+512x512.jpg").quantization[0]) == {1}
    main([str(source), str(target), "--save_as_png"])
    assert np.array_equal(np.asarray(Image.open(target / "a+512x512.png")), np.asarray(gradient(96, 96)))


def test_each_interpolation_gives_another_picture(source: Path, target: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(source / "a.png")
    made = {}
    for method in ("area", "cubic", "lanczos4", "nearest", "linear", "box"):
        main([str(source), str(target), "--max_resolution", "64x64", "--save_as_png", "--interpolation", method])
        made[method] = (target / "a+64x64.png").read_bytes()
    assert len(set(made.values())) == 6
    main([str(source), str(target), "--max_resolution", "64x64", "--save_as_png"])
    assert (target / "a+64x64.png").read_bytes() == made["area"]


def test_pictures_are_set_upright(source: Path, target: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright: turn right by 90 degrees to look at it
    gradient(60, 30).save(source / "a.png", exif=exif)
    main([str(source), str(target), "--save_as_png"])
    made = Image.open(target / "a+512x512.png")
    assert made.size == (30, 60)
    assert made.getexif().get(274) is None
    assert np.array_equal(np.asarray(made), np.asarray(gradient(60, 30).transpose(Image.Transpose.ROTATE_270)))


def test_transparency_is_kept_and_hidden_colours_do_not_bleed(source: Path, target: Path) -> None:
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[:, :31] = (255, 0, 0, 255)
    pixels[:, 31:] = (0, 255, 0, 0)
    Image.fromarray(pixels).save(source / "a.png")
    exif = Image.Exif()
    exif[274] = 8
    Image.fromarray(pixels).save(source / "turned.png", exif=exif)
    main([str(source), str(target), "--max_resolution", "32x32"])
    assert names(target) == ["a+32x32.png", "turned+32x32.png"]
    made = np.asarray(Image.open(target / "a+32x32.png"))
    assert made.shape == (32, 32, 4)
    assert (made[:, 15] == (255, 0, 0, 128)).all()
    assert (made[:, 16:, 3] == 0).all()
    assert (np.asarray(Image.open(target / "turned+32x32.png")) == np.rot90(made)).all()


def test_an_opaque_alpha_channel_asks_for_nothing(source: Path, target: Path) -> None:
    gradient(32, 32).convert("RGBA").save(source / "a.png")
    main([str(source), str(target), "--max_resolution", "32x32"])
    assert names(target) == ["a+32x32.jpg"]


def test_a_colour_profile_stays(source: Path, target: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    gradient(32, 32).save(source / "a.png", icc_profile=profile)
    gradient(32, 32).convert("L").save(source / "grey.png", icc_profile=profile)
    main([str(source), str(target), "--max_resolution", "32x32"])
    assert Image.open(target / "a+32x32.jpg").info["icc_profile"] == profile
    assert "icc_profile" not in Image.open(target / "grey+32x32.jpg").info


def test_other_files_are_copied_and_those_of_a_picture_for_each_size_if_wanted(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient(64, 64).save(source / "a.png")
    for name, text in {"a.txt": "caption", "a.npz": "cache", "readme.md": "x", ".hidden": "y"}.items():
        (source / name).write_text(text)
    (source / "sub").mkdir()
    monkeypatch.chdir(source.parent)
    main(["source", str(target), "--max_resolution", "32x32,16x16"])
    assert names(target) == ["a+16x16.jpg", "a+32x32.jpg", "a.npz", "a.txt", "readme.md"]
    main(["source", str(target / "with"), "--max_resolution", "32x32,16x16", "--copy_associated_files"])
    assert set(names(target / "with")) - set(names(target)) == {"a+16x16.txt", "a+32x32.txt"}
    assert (target / "with" / "a+16x16.txt").read_text() == "caption"


def test_damaged_pictures_are_named_together_and_the_others_done(source: Path, target: Path) -> None:
    for name in ("a.png", "b.jpg", "c.png"):
        gradient(64, 64).save(source / name)
    os.truncate(source / "a.png", 100)
    (source / "b.jpg").write_text("no picture")
    with pytest.raises(UserError) as error:
        main([str(source), str(target), "--max_resolution", "32x32"])
    lines = str(error.value).splitlines()
    assert lines[0] == "2 of 3 pictures could not be resized:"
    assert [str(source / name) in line for name, line in zip(("a.png", "b.jpg"), lines[1:3], strict=True)] == [True, True]
    assert names(target) == ["c+32x32.jpg"]


def test_files_of_a_picture_that_cannot_be_written_are_not_copied_for_its_sizes(source: Path, target: Path) -> None:
    for name in ("a", "b"):
        gradient(64, 64).save(source / f"{name}.png")
        (source / f"{name}.txt").write_text("caption")
    os.truncate(source / "a.png", 100)
    with pytest.raises(UserError, match="1 of 2 pictures"):
        main([str(source), str(target), "--max_resolution", "32x32", "--copy_associated_files"])
    assert names(target) == ["a.txt", "b+32x32.jpg", "b+32x32.txt", "b.txt"]


def test_a_picture_smaller_than_the_divisor_is_named(source: Path, target: Path) -> None:
    gradient(100, 20).save(source / "a.png")
    with pytest.raises(UserError, match=r"a\.png is 100x20, .* leaves 96x0\. Remove it or lower --divisible_by"):
        main([str(source), str(target), "--divisible_by", "32"])


def test_two_pictures_of_one_name_are_refused_before_anything_is_written(source: Path, target: Path) -> None:
    gradient(64, 64).save(source / "a.png")
    gradient(64, 64).save(source / "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg and a\.png\. Rename all but one"):
        main([str(source), str(target)])
    assert not target.exists()


def test_a_full_disk_ends_the_run_at_once_and_leaves_what_was_there(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient(64, 64).save(source / "a.png")
    target.mkdir(parents=True)
    (target / "a+32x32.jpg").write_text("before")

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"^[^\n]*the disk is full[^\n]*$"):
        main([str(source), str(target), "--max_resolution", "32x32"])
    assert (target / "a+32x32.jpg").read_text() == "before"
    assert names(target) == ["a+32x32.jpg"]


def test_all_wrong_options_are_told_together(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as error:
        main([str(tmp_path / "gone"), str(tmp_path / "file"), "--divisible_by", "0", "--max_resolution", "512x512,384"])
    told = error.value.problems
    words = ("There is no folder", "is a file", "--divisible_by must be at least 1", "--max_resolution must be sizes")
    assert [word in problem for word, problem in zip(words, told, strict=True)] == [True] * 4
    with pytest.raises(UsageError, match="is the source folder itself"):
        main([str(source), str(source / ".." / "source")])
    with pytest.raises(UserError, match="There are no pictures"):
        main([str(source), str(tmp_path / "target")])
