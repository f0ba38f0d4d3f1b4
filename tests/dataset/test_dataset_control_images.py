"""Control and mask images: found by name, checked against their image, all that is wrong told together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_samples import config, make_image, section, subset
from PIL import Image

from library.dataset.dataset import Dataset
from library.dataset.findings import Findings, Kind, Severity
from library.dataset.index import build_index
from library.dataset.loader import load_batch
from library.dataset.plan import Share
from library.options.errors import UserError


@pytest.fixture
def controls(folder: Path) -> Path:
    """A control image for each of the five images, in other formats."""
    control = folder.parent / "controls"
    control.mkdir()
    for number, size in enumerate([(64, 64), (96, 64), (64, 96), (80, 60), (128, 64)]):
        make_image(control / f"im{number}.{'webp' if number % 2 else 'BMP'}", size, seed=number + 3)
    return control


def with_controls(folder: Path, controls: Path, **changes: Any) -> Any:
    return config(section(subset(folder, conditioning_data_dir=str(controls)), **changes))


def test_images_are_paired_by_name_whatever_the_ending(folder: Path, controls: Path) -> None:
    dataset = Dataset(with_controls(folder, controls), 1)
    paths = [Path(str(item.conditioning_path)).name for item in dataset.items]
    assert paths == ["im0.BMP", "im1.webp", "im2.BMP", "im3.webp", "im4.BMP"]


def test_everything_that_is_wrong_is_told_together(folder: Path, controls: Path) -> None:
    (controls / "im0.BMP").unlink()
    make_image(controls / "im1.webp", (48, 32))
    (controls / "im2.BMP").write_bytes(b"BM broken")
    make_image(controls / "im9.png")
    with pytest.raises(UserError) as caught:
        build_index(with_controls(folder, controls, enable_bucket=True))
    told = str(caught.value)
    assert told.startswith("The dataset has 3 errors:")
    assert f"{folder}/im0.png has no control or mask image: {controls} has no image named im0." in told
    assert f"{controls}/im1.webp is 48x32, but its image {folder}/im1.png is 96x64. Make them equal." in told
    assert f"{controls}/im2.BMP" in told
    assert f"1 of 5 images in {controls} belong to no image and are not used: im9.png." in told


def test_what_is_left_over_is_a_warning(folder: Path, controls: Path) -> None:
    make_image(controls / "im0.png", (64, 64))  # beside im0.BMP, which comes first
    make_image(controls / "other.png")
    findings = Findings()
    (built,) = build_index(with_controls(folder, controls), findings)
    assert not findings.has_errors
    ((kind, count, (problem,)),) = findings.groups(Severity.WARNING)
    assert (kind, count) == (Kind.UNUSED_CONTROL, 2)
    assert "2 of 7 images" in problem.sentence and "im0.png, other.png" in problem.sentence
    assert Path(str(built.items[0].conditioning_path)).name == "im0.BMP"


@pytest.mark.parametrize(("size", "bucketed", "fits"), [
    ((48, 32), False, True), ((48, 32), True, False), ((192, 128), False, True), ((96, 65), False, True), ((96, 80), False, False),
    ((64, 96), False, False), ((96, 64), True, True),
])  # fmt: skip
def test_control_images_need_the_size_with_buckets_and_the_shape_without(
    folder: Path, controls: Path, size: tuple[int, int], bucketed: bool, fits: bool
) -> None:
    make_image(controls / "im1.webp", size)
    findings = Findings()
    build_index(with_controls(folder, controls, enable_bucket=bucketed), findings)
    assert findings.has_errors is not fits


def test_a_camera_turned_control_image_is_set_upright(folder: Path, controls: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(controls / "im1.webp") as upright:
        pixels = np.asarray(upright.convert("RGB"))
        (controls / "im1.webp").unlink()
        upright.transpose(Image.Transpose.ROTATE_90).save(controls / "im1.png", exif=exif)
    dataset = Dataset(with_controls(folder, controls, enable_bucket=True, resolution=(96, 64)), 1)
    use = next(use for use in range(5) if dataset.item_of(use).path.endswith("im1.png"))
    batch = load_batch(dataset, 1, Share((use,), 1.0))
    assert batch.conditioning is not None
    found = (batch.conditioning[0].permute(1, 2, 0).numpy() + 1) * 127.5
    np.testing.assert_allclose(found, pixels, atol=0.01)


def test_transparent_parts_of_a_mask_are_black(folder: Path, controls: Path) -> None:
    rgba = np.full((64, 64, 4), 255, np.uint8)
    rgba[:, :32, 3] = 0
    Image.fromarray(rgba).save(controls / "im0.png")
    (controls / "im0.BMP").unlink()
    dataset = Dataset(with_controls(folder, controls), 1)
    batch = load_batch(dataset, 1, Share((0,), 1.0))
    assert batch.conditioning is not None
    assert (batch.conditioning[..., :32] == -1).all()
    assert (batch.conditioning[..., 32:] == 1).all()


def test_without_a_folder_there_are_none(folder: Path) -> None:
    dataset = Dataset(config(section(subset(folder))), 1)
    assert all(item.conditioning_path is None for item in dataset.items)
    assert load_batch(dataset, 1, Share((0,), 1.0)).conditioning is None
