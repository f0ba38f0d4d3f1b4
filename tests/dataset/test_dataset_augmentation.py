"""What chance changes of a picture: how often, how strongly, and that it depends on nothing but seed, epoch and image."""

import colorsys
import random
from pathlib import Path

import numpy as np
import pytest
from dataset_files import load
from dataset_samples import config, make_image, make_loader, section, subset
from hypothesis import given
from hypothesis import strategies as st

from library.dataset.augmentation import (
    ColorChange,
    Face,
    change_colors,
    draw_color_change,
    draw_crop,
    draw_face_crop,
    face_in_name,
)
from library.dataset.buckets import BucketChooser
from library.dataset.dataset import Dataset
from library.dataset.findings import Findings, Kind, Severity
from library.dataset.index import build_index
from library.dataset.plan import draw_seed
from library.options.errors import UsageError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def test_a_third_of_the_uses_changes_colour_half_of_them_the_hue() -> None:
    drawn = [draw_color_change(random.Random(seed)) for seed in range(6000)]
    changes = [change for change in drawn if change]
    hues = [change.hue_shift for change in changes if change.hue_shift]
    gammas = [change.gamma for change in changes if change.gamma != 1]
    assert len(changes) / 6000 == pytest.approx(0.33, abs=0.02)
    assert len(hues) + len(gammas) == len(changes)
    assert len(hues) / len(changes) == pytest.approx(0.5, abs=0.04)
    assert (min(hues), max(hues)) == pytest.approx((-8, 8), abs=0.1)
    assert (min(gammas), max(gammas)) == pytest.approx((0.95, 1.05), abs=0.002)
    assert np.std(hues) == pytest.approx(8 / np.sqrt(3), rel=0.05)  # as of a uniform distribution
    assert np.std(gammas) == pytest.approx(0.05 / np.sqrt(3), rel=0.05)


@pytest.mark.parametrize("shift", [-8.0, -0.7, 3.3, 8.0])
def test_the_hue_is_turned_by_two_degrees_a_unit(shift: float) -> None:
    changed = change_colors(NOISE, ColorChange(hue_shift=shift))
    for colour, found in zip(NOISE.reshape(-1, 3)[::37], changed.reshape(-1, 3)[::37], strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(colour / 255))
        wanted = np.array(colorsys.hsv_to_rgb((hue + shift * 2 / 360) % 1, saturation, value)) * 255
        assert np.abs(found - wanted).max() <= 0.51


@pytest.mark.parametrize("gamma", [0.95, 1.05])
def test_gamma_acts_on_values_from_0_to_1(gamma: float) -> None:
    changed = change_colors(NOISE, ColorChange(gamma=gamma))
    assert np.abs(changed - (NOISE / 255) ** gamma * 255).max() <= 0.5
    ends = change_colors(np.array([[[0, 255, 200]]], np.uint8), ColorChange(gamma=gamma))
    assert ends[0, 0, :2].tolist() == [0, 255]
    assert abs(int(ends[0, 0, 2]) - 200) <= 3  # not 153 or 255, as where bytes are raised to a power


def test_greys_have_no_hue_to_turn() -> None:
    grey = np.repeat(NOISE[..., :1], 3, axis=2)
    np.testing.assert_array_equal(change_colors(grey, ColorChange(hue_shift=8)), grey)


BUCKETED = section(resolution=(64, 64), enable_bucket=True)


def test_a_random_crop_reaches_every_place_and_nothing_else() -> None:
    geometry = BucketChooser(BUCKETED).choose((100, 90))
    excess = tuple(side - wanted for side, wanted in zip(geometry.resized, geometry.bucket, strict=True))
    assert excess == (7, 0)
    crops = [draw_crop(random.Random(seed), (100, 90), geometry, bucketed=True) for seed in range(400)]
    assert {crop.resized for crop in crops} == {geometry.resized}
    assert {crop.crop for crop in crops} == {(left, 0) for left in range(8)}


def test_width_is_drawn_before_height_and_only_where_there_is_a_choice() -> None:
    geometry = BucketChooser(section(resolution=(64, 64))).choose((100, 80))
    first, twin = random.Random(3), random.Random(3)
    crop = draw_crop(first, (100, 80), geometry, bucketed=False)
    assert crop.crop == (twin.randint(0, 36), twin.randint(0, 16))
    assert first.random() == twin.random()
    exact = BucketChooser(BUCKETED).choose((64, 64))
    assert draw_crop(first, (64, 64), exact, bucketed=True) == exact.placement
    assert first.random() == twin.random()


def test_without_buckets_a_window_is_cut_from_the_picture_as_it_is_if_it_is_large_enough() -> None:
    chooser = BucketChooser(section(resolution=(64, 64)))
    large = draw_crop(random.Random(0), (300, 200), chooser.choose((300, 200)), bucketed=False)
    assert large.resized == (300, 200)
    small = draw_crop(random.Random(0), (300, 50), chooser.choose((300, 50)), bucketed=False)
    assert small.resized == (384, 64)


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("a_10_20_30_40.png", Face((10, 20), 40)),
        ("dir_1_2_3/b_c_5_0_7_6.webp", Face((5, 0), 7)),
        ("a_0_20_30_40.png", None),
        ("a_-1_20_30_40.png", None),
        ("10_20_30_40.png", None),
        ("a_10_20_30_x.png", None),
        ("a_10_20_0_0.png", None),
    ],
)
def test_a_face_is_read_from_the_end_of_the_name(name: str, face: Face | None) -> None:
    assert face_in_name(f"/images/{name}") == face


def test_the_crop_spans_the_wanted_multiple_of_the_face() -> None:
    face = Face((500, 300), 100)
    for seed in range(100):
        placement = draw_face_crop(random.Random(seed), (1000, 800), (256, 256), face, (2.0, 4.0), random_crop=False)
        scale = placement.resized[0] / 1000
        assert 2 - 0.02 <= 256 / (100 * scale) <= 4 + 0.02
        left, top = (position / scale for position in placement.crop)
        assert left - 1 <= 450 and left + 256 / scale + 1 >= 550
        assert top - 1 <= 250 and top + 256 / scale + 1 >= 350


def test_equal_factors_put_the_face_in_the_middle_every_time() -> None:
    crops = {
        draw_face_crop(random.Random(seed), (1000, 800), (256, 320), Face((500, 300), 100), (2.0, 2.0), random_crop=False)
        for seed in range(20)
    }
    (placement,) = crops
    scale = placement.resized[0] / 1000
    assert placement.crop[0] + 128 == pytest.approx(500 * scale, abs=1)
    assert placement.crop[1] + 160 == pytest.approx(300 * scale, abs=1)


def test_different_factors_move_a_large_face_a_little_and_a_small_one_not() -> None:
    def middles(size: int) -> set[float]:
        found = set()
        for seed in range(60):
            rng, face = random.Random(seed), Face((500, 500), size)
            placement = draw_face_crop(rng, (1000, 1000), (256, 256), face, (2.0, 2.0001), random_crop=False)
            found.add(round((placement.crop[0] + 128) / placement.resized[0] * 1000) - 500)
        return found

    assert max(map(abs, middles(100))) in range(3, 7)  # a twentieth of the face
    assert middles(20) <= {-1, 0, 1}


def test_a_random_crop_moves_the_face_about_and_stays_inside() -> None:
    crops = [
        draw_face_crop(random.Random(seed), (1000, 800), (256, 256), Face((500, 400), 100), (2.0, 2.0), random_crop=True)
        for seed in range(300)
    ]
    left = [crop.crop[0] for crop in crops]
    assert min(left) == 0 and max(left) == crops[0].resized[0] - 256
    assert np.mean(left) == pytest.approx(crops[0].resized[0] / 2 - 128, rel=0.1)


@given(
    st.tuples(st.integers(40, 900), st.integers(40, 900)),
    st.tuples(st.integers(1, 900), st.integers(0, 900)),
    st.integers(1, 500),
    st.floats(0.1, 5),
    st.floats(1, 3),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_a_face_crop_always_lies_inside_the_picture(
    size: tuple[int, int], center: tuple[int, int], face: int, low: float, spread: float, random_crop: bool, seed: int
) -> None:
    bucket = (64, 96)
    placement = draw_face_crop(random.Random(seed), size, bucket, Face(center, face), (low, low * spread), random_crop=random_crop)
    for resized, crop, wanted, side in zip(placement.resized, placement.crop, bucket, size, strict=True):
        assert 0 <= crop <= resized - wanted
        assert resized <= max(side, wanted, int(side * max(64 / size[0], 96 / size[1]) + 0.5))


def faces(folder: Path) -> Path:
    folder.mkdir()
    make_image(folder / "a_150_60_40_50.png", (200, 120))
    (folder / "a.txt").write_text("a person")
    make_image(folder / "b.png", (200, 120))
    (folder / "b.txt").write_text("a landscape")
    return folder


@pytest.mark.parametrize("bucketed", [False, True])
def test_images_with_a_face_are_cropped_around_it_and_others_as_usual(tmp_path: Path, bucketed: bool) -> None:
    rules = subset(faces(tmp_path / "images"), face_crop_aug_range=(1.0, 1.5))
    dataset = Dataset(config(section(rules, enable_bucket=bucketed)), 1)
    with_face, without = dataset.items
    for use in range(2):
        draws = dataset.draws(use, 1)
        if dataset.item_of(use) == without:
            assert draws.placement == without.geometry.placement
            continue
        scale = draws.placement.resized[0] / 200
        assert scale > with_face.geometry.resized[0] / 200
        left, top = draws.placement.crop
        assert left <= 150 * scale <= left + with_face.geometry.bucket[0]
        assert top <= 60 * scale <= top + with_face.geometry.bucket[1]


def test_images_without_a_face_are_counted(tmp_path: Path) -> None:
    findings = Findings()
    build_index(config(section(subset(faces(tmp_path / "images"), face_crop_aug_range=(1.0, 1.5)))), findings)
    ((kind, count, (problem,)),) = findings.groups(Severity.WARNING)
    assert (kind, count) == (Kind.CONFIG, 1)
    assert "1 of 2 images" in problem.sentence and "b.png" in problem.sentence


ALL = {"flip_aug": True, "random_crop": True, "color_aug": True, "shuffle_caption": True}


def dataset_with(folder: Path, **rules: object) -> Dataset:
    return Dataset(config(section(subset(folder, num_repeats=40, **rules), enable_bucket=True, resolution=(48, 48))), 7)


@pytest.mark.parametrize("switched", list(ALL))
def test_what_is_drawn_earlier_stays_when_something_is_switched_on(folder: Path, switched: str) -> None:
    parts = {
        "flip_aug": lambda draws: draws.flipped,
        "random_crop": lambda draws: draws.placement,
        "color_aug": lambda draws: draws.color,
        "shuffle_caption": lambda draws: draws.caption,
    }
    position = list(ALL).index(switched)
    earlier = dict(list(ALL.items())[:position])
    without, with_it = dataset_with(folder, **earlier), dataset_with(folder, **earlier, **{switched: True})
    pairs = [(without.draws(use, 1), with_it.draws(use, 1)) for use in range(without.num_uses)]
    for name in earlier:
        assert all(parts[name](old) == parts[name](new) for old, new in pairs)
    assert any(parts[switched](old) != parts[switched](new) for old, new in pairs)


def test_draws_come_from_the_generator_of_the_use_in_the_stated_order(folder: Path) -> None:
    dataset = dataset_with(folder, flip_aug=True, color_aug=True)
    for use in range(40):
        rng = random.Random(draw_seed(7, 3, use))
        draws = dataset.draws(use, 3)
        assert draws.flipped == (rng.random() < 0.5)
        assert draws.color == draw_color_change(rng)


def test_two_epochs_and_any_number_of_workers_see_their_own_draws(folder: Path) -> None:
    dataset = dataset_with(folder, **ALL)
    alone = list(make_loader(dataset, 1))
    shared = list(make_loader(dataset, 1, num_workers=2))
    later = list(make_loader(dataset, 2))
    assert all((a.images == b.images).all() for a, b in zip(alone, shared, strict=True))
    assert dataset.draws(0, 1) != dataset.draws(0, 2)
    assert len(alone) == len(later)


def test_colours_of_the_batch_change(folder: Path) -> None:
    plain, varied = dataset_with(folder), dataset_with(folder, color_aug=True)
    plan = plain.plan(1, 1)
    assert plan == varied.plan(1, 1)
    changed = same = 0
    for before, after, uses in zip(make_loader(plain, 1), make_loader(varied, 1), plan.batches, strict=True):
        assert before.images is not None and after.images is not None
        for row, use in enumerate(uses):
            equal = bool((before.images[row] == after.images[row]).all())
            assert equal or varied.draws(use, 1).color is not None
            changed, same = changed + (not equal), same + equal
    assert changed > 40
    assert same > 100


@pytest.mark.parametrize("key", ["color_aug", "random_crop", "face_crop_aug_range"])
def test_what_changes_pixels_from_use_to_use_is_refused_with_cached_latents(folder: Path, tmp_path: Path, key: str) -> None:
    file = tmp_path / "data.toml"
    value = "[1.0, 2.0]" if key == "face_crop_aug_range" else "true"
    file.write_text(f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{folder.as_posix()}"\n{key} = {value}\n')
    assert getattr(load(file).sections[0].subsets[0], key)
    for caching in ("cache_latents", "cache_latents_to_disk"):
        with pytest.raises(UsageError) as caught:
            load(file, {caching: True})
        (problem,) = caught.value.problems
        told = "changes the image from use to use; --cache_latents encodes it once. Switch one of them off."
        assert problem.endswith(f"{key} of {folder.as_posix()} {told}")


def test_mirroring_and_masks_go_with_cached_latents(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.toml"
    keys = "flip_aug = true\nalpha_mask = true"
    file.write_text(f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{folder.as_posix()}"\n{keys}\n')
    (subset,) = load(file, {"cache_latents": True}).sections[0].subsets
    assert subset.flip_aug and subset.alpha_mask
