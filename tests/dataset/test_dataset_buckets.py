"""Buckets against tables computed with sd-scripts' classes."""

import numpy as np
import pytest
from dataset_samples import section
from hypothesis import given
from hypothesis import strategies as st

from library.dataset.buckets import BucketChooser, bucket_sizes, crop_top_left
from library.options.dataset_config import SectionConfig

FIRST = {"resolution": (1024, 1024), "min_bucket_reso": 256, "max_bucket_reso": 2048, "bucket_reso_steps": 64}
SETTINGS = {
    "A": FIRST,
    "B": FIRST | {"max_bucket_reso": 1024},
    "C": FIRST | {"max_bucket_reso": 1024, "bucket_no_upscale": True},
    "D": {"resolution": (768, 512), "min_bucket_reso": 320, "max_bucket_reso": 960, "bucket_reso_steps": 32},
}

# image | bucket | resized | pixel crop (left,top) | conditioning (top,left) | the same when flipped
TABLE = """
A
| 1024x1024 | 1024x1024 | 1024x1024 | 0,0 | 0,0 | 0,0 |
| 512x512 | 1024x1024 | 1024x1024 | 0,0 | 0,0 | 0,0 |
| 1920x1080 | 1344x768 | 1365x768 | 10,0 | 6,0 | 6,0 |
| 1080x1920 | 768x1344 | 768x1365 | 0,10 | 0,6 | 0,6 |
| 768x1024 | 896x1152 | 896x1195 | 0,21 | 0,16 | 0,16 |
| 1000x1500 | 832x1216 | 832x1248 | 0,16 | 0,10 | 0,11 |
| 832x1216 | 832x1216 | 832x1216 | 0,0 | 0,0 | 0,0 |
| 3000x1000 | 1728x576 | 1728x576 | 0,0 | 0,0 | 0,0 |
| 640x480 | 1152x896 | 1195x896 | 21,0 | 16,0 | 16,0 |
| 4000x3000 | 1152x896 | 1195x896 | 21,0 | 16,0 | 16,0 |
| 1023x1025 | 1024x1024 | 1024x1026 | 0,1 | 0,0 | 0,1 |
| 300x1200 | 512x2048 | 512x2048 | 0,0 | 0,0 | 0,0 |
| 2048x512 | 2048x512 | 2048x512 | 0,0 | 0,0 | 0,0 |
| 1365x768 | 1344x768 | 1365x768 | 10,0 | 5,0 | 5,0 |
| 257x2000 | 256x2048 | 263x2048 | 3,0 | 27,0 | 27,0 |
| 896x1152 | 896x1152 | 896x1152 | 0,0 | 0,0 | 0,0 |
B
| 1024x1024 | 1024x1024 | 1024x1024 | 0,0 | 0,0 | 0,0 |
| 512x512 | 1024x1024 | 1024x1024 | 0,0 | 0,0 | 0,0 |
| 1920x1080 | 1024x576 | 1024x576 | 0,0 | 0,0 | 0,0 |
| 1080x1920 | 576x1024 | 576x1024 | 0,0 | 0,0 | 0,0 |
| 768x1024 | 768x1024 | 768x1024 | 0,0 | 0,0 | 0,0 |
| 1000x1500 | 704x1024 | 704x1056 | 0,16 | 0,10 | 0,11 |
| 832x1216 | 704x1024 | 704x1029 | 0,2 | 0,1 | 0,2 |
| 3000x1000 | 1024x320 | 1024x341 | 0,10 | 0,32 | 0,32 |
| 640x480 | 1024x768 | 1024x768 | 0,0 | 0,0 | 0,0 |
| 4000x3000 | 1024x768 | 1024x768 | 0,0 | 0,0 | 0,0 |
| 1023x1025 | 1024x1024 | 1024x1026 | 0,1 | 0,0 | 0,1 |
| 300x1200 | 256x1024 | 256x1024 | 0,0 | 0,0 | 0,0 |
| 2048x512 | 1024x256 | 1024x256 | 0,0 | 0,0 | 0,0 |
| 1365x768 | 1024x576 | 1024x576 | 0,0 | 0,0 | 0,0 |
| 257x2000 | 256x1024 | 256x1992 | 0,484 | 0,62 | 0,62 |
| 896x1152 | 768x1024 | 796x1024 | 14,0 | 18,0 | 18,0 |
C
| 1024x1024 | 1024x1024 | 1024x1024 | 0,0 | 0,0 | 0,0 |
| 512x512 | 512x512 | 512x512 | 0,0 | 0,0 | 0,0 |
| 1920x1080 | 1344x768 | 1365x768 | 10,0 | 6,0 | 6,0 |
| 1080x1920 | 768x1344 | 768x1365 | 0,10 | 0,6 | 0,6 |
| 768x1024 | 768x1024 | 768x1024 | 0,0 | 0,0 | 0,0 |
| 1000x1500 | 832x1216 | 832x1248 | 0,16 | 0,10 | 0,11 |
| 832x1216 | 832x1216 | 832x1216 | 0,0 | 0,0 | 0,0 |
| 3000x1000 | 1728x576 | 1728x576 | 0,0 | 0,0 | 0,0 |
| 640x480 | 640x448 | 640x480 | 0,16 | 0,21 | 0,21 |
| 4000x3000 | 1088x832 | 1109x832 | 10,0 | 8,0 | 8,0 |
| 1023x1025 | 960x1024 | 1023x1025 | 31,0 | 31,0 | 31,0 |
| 300x1200 | 256x1152 | 300x1200 | 22,24 | 64,0 | 64,0 |
| 2048x512 | 2048x512 | 2048x512 | 0,0 | 0,0 | 0,0 |
| 1365x768 | 1344x768 | 1365x768 | 10,0 | 5,0 | 5,0 |
| 257x2000 | 256x1984 | 257x2000 | 0,8 | 0,0 | 0,1 |
| 896x1152 | 896x1152 | 896x1152 | 0,0 | 0,0 | 0,0 |
D
| 1024x1024, 512x512 | 608x608 | 608x608 | 0,0 | 0,0 | 0,0 |
| 1920x1080 | 832x448 | 832x468 | 0,10 | 0,17 | 0,18 |
| 1080x1920 | 448x832 | 468x832 | 10,0 | 17,0 | 17,0 |
| 768x1024 | 544x704 | 544x725 | 0,10 | 0,8 | 0,8 |
| 1000x1500 | 512x768 | 512x768 | 0,0 | 0,0 | 0,0 |
| 832x1216 | 512x736 | 512x748 | 0,6 | 0,4 | 0,4 |
| 3000x1000 | 960x320 | 960x320 | 0,0 | 0,0 | 0,0 |
| 640x480, 4000x3000 | 704x544 | 725x544 | 10,0 | 8,0 | 8,0 |
| 1023x1025 | 608x608 | 608x609 | 0,0 | 0,0 | 0,1 |
| 300x1200 | 320x960 | 320x1280 | 0,160 | 0,40 | 0,40 |
| 2048x512 | 960x320 | 1280x320 | 160,0 | 40,0 | 40,0 |
| 1365x768 | 832x448 | 832x468 | 0,10 | 0,17 | 0,18 |
| 257x2000 | 320x960 | 320x2490 | 0,765 | 0,98 | 0,98 |
| 896x1152 | 544x704 | 548x704 | 2,0 | 2,0 | 2,0 |
"""


def setting(name: str) -> SectionConfig:
    return section(enable_bucket=True, **SETTINGS[name])


def rows() -> list[tuple[str, ...]]:
    found, name = [], ""
    for line in TABLE.strip().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 1:
            name = cells[0]
        else:
            found += [(name, image.strip(), *cells[1:]) for image in cells[0].split(", ")]
    return found


def pair(text: str) -> tuple[int, int]:
    first, second = text.replace("x", ",").split(",")
    return int(first), int(second)


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]}-{row[1]}")
def test_geometry_and_conditioning_equal_the_table(row: tuple[str, ...]) -> None:
    name, image, bucket, resized, crop, conditioning, flipped = row
    geometry = BucketChooser(setting(name)).choose(pair(image))
    assert geometry.bucket == pair(bucket)
    assert geometry.resized == pair(resized)
    assert geometry.crop == pair(crop)
    assert crop_top_left(geometry, flipped=False) == pair(conditioning)
    assert crop_top_left(geometry, flipped=True) == pair(flipped)


def test_the_table_is_complete() -> None:
    assert len(rows()) == 64


@pytest.mark.parametrize(
    ("resolution", "lowest", "highest", "step", "count", "start"),
    [
        ((1024, 1024), 256, 2048, 64, 41, "256x2048 320x2048 384x2048 448x2048 512x1856 512x1920 512x1984 512x2048 576x1664"),
        ((1024, 1024), 256, 1024, 64, 25, "256x1024 320x1024 384x1024"),
        ((1024, 1024), 256, 2048, 32, 81, "256x2048"),
        ((1024, 1024), 512, 2048, 128, 17, "512x1664 512x1792 512x1920 512x2048 640x1408 640x1536 768x1280 896x1152 1024x1024"),
        ((512, 512), 256, 1024, 64, 17, "256x832 256x896 256x960 256x1024 320x704 320x768 384x640 448x576 512x512"),
        ((768, 512), 320, 960, 32, 27, "320x960 352x960 384x960 416x896 416x928 448x832 448x864 480x800 512x736 512x768 544x704"),
    ],
)  # fmt: skip
def test_bucket_lists_equal_the_table(
    resolution: tuple[int, int], lowest: int, highest: int, step: int, count: int, start: str
) -> None:
    sizes = bucket_sizes(resolution, lowest, highest, step)
    expected = [pair(size) for size in start.split()]
    assert len(sizes) == count
    assert sizes[: len(expected)] == expected
    assert {size[::-1] for size in sizes} == set(sizes)


def test_the_square_bucket_is_floored_to_the_step() -> None:
    assert (960, 960) in bucket_sizes((1000, 1000), 256, 1024, 64)


@pytest.mark.parametrize(
    ("image", "bucket", "resized"),
    [
        ((1025, 1024), (1024, 1024), (1025, 1024)),
        ((2047, 513), (1984, 512), (2043, 512)),
        ((8000, 200), (5120, 128), None),
        ((100, 5000), (64, 4992), None),
    ],
)
def test_no_upscale_makes_a_bucket_from_the_image(
    image: tuple[int, int], bucket: tuple[int, int], resized: tuple[int, int] | None
) -> None:
    geometry = BucketChooser(setting("C")).choose(image)
    assert geometry.bucket == bucket
    assert resized is None or geometry.resized == resized


def test_an_image_below_one_step_is_refused_with_its_size() -> None:
    with pytest.raises(ValueError, match=r"60x60.*bucket of 64 pixels"):
        BucketChooser(setting("C")).choose((60, 60))


@pytest.mark.parametrize("image", [(30_000, 2), (2, 30_000), (30_000, 100)])
def test_a_picture_of_which_nothing_would_be_left_is_refused_before_it_fills_the_memory(image: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{image[0]}x{image[1]}, of which next to nothing is left"):
        BucketChooser(setting("B")).choose(image)
    with pytest.raises(ValueError, match="next to nothing"):
        BucketChooser(section(resolution=(64, 64))).choose(image)


def test_the_transposed_image_may_get_another_ratio() -> None:
    chooser = BucketChooser(setting("A"))
    assert chooser.choose((1276, 1055)).bucket == (1088, 960)
    assert chooser.choose((1055, 1276)).bucket == (896, 1152)


def test_conditioning_crop_keeps_its_fractions() -> None:
    chooser = BucketChooser(setting("A"))
    assert chooser.choose((1000, 1500)).crop_ltrb == pytest.approx([10, 0, 820.6667, 1216], abs=1e-4)
    assert chooser.choose((257, 2000)).crop_ltrb == pytest.approx([0, 27, 256, 2019.2179], abs=1e-4)


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_the_resized_image_always_covers_the_bucket(width: int, height: int) -> None:
    try:
        geometry = BucketChooser(setting("A")).choose((width, height))
    except ValueError:
        assert max(width / height, height / width) > 256
        return
    assert geometry.resized[0] >= geometry.bucket[0]
    assert geometry.resized[1] >= geometry.bucket[1]


def test_without_buckets_every_image_gets_the_resolution() -> None:
    geometry = BucketChooser(section(resolution=(512, 768))).choose((1000, 1000))
    assert geometry.bucket == (512, 768)
    assert geometry.resized == (768, 768)
    assert geometry.crop == (128, 0)


@pytest.mark.parametrize("name", SETTINGS)
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), max_size=30))
def test_buckets_of_many_images_are_those_of_each(name: str, sizes: list[tuple[int, int]]) -> None:
    chooser = BucketChooser(setting(name))
    found = chooser.buckets(np.array(sizes, dtype=np.int32).reshape(-1, 2)).tolist()
    for size, bucket in zip(sizes, found, strict=True):
        if bucket == [0, 0]:
            with pytest.raises(ValueError, match=r"too small|next to nothing"):
                chooser.choose(size)
        else:
            assert chooser.choose(size).bucket == tuple(bucket)
