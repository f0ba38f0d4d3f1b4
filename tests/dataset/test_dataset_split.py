"""Images held out of training: never trained on, none lost, the same ones every time."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from library.dataset.split import held_out, num_held_out

SHARES = st.floats(0.05, 1.0)


def names(count: int) -> list[str]:
    return [f"folder/{number:03d}.png" for number in range(count)]


@given(count=st.integers(1, 30), share=SHARES, seed=st.integers(0, 2**32 - 1))
@example(count=3, share=0.2, seed=0)
@example(count=3, share=0.5, seed=0)
@example(count=10, share=0.15, seed=0)
@example(count=30, share=1.0, seed=0)
def test_a_share_is_held_out_and_something_is_left(count, share, seed):
    chosen = held_out(names(count), share, seed)
    assert chosen <= set(names(count))
    assert len(chosen) == num_held_out(count, share)
    assert len(chosen) < count
    assert len(chosen) >= (count > 1)


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(0, 0.2, 0), (1, 0.9, 0), (2, 0.01, 1), (2, 1.0, 1), (10, 0.15, 2), (20, 0.2, 4), (3, 0.25, 1), (5, 0.0, 0)],
)
def test_the_number_held_out_is_rounded_but_never_none_and_never_all(count, share, expected):
    assert num_held_out(count, share) == expected


def test_the_choice_depends_on_the_seed_and_the_names_and_on_nothing_else():
    images = names(20)
    assert held_out(images, 0.2, 1) == held_out(images[::-1], 0.2, 1)
    assert held_out(images, 0.2, 1) != held_out(images, 0.2, 2)
    elsewhere = held_out([f"/another/place/{image}" for image in images], 0.2, 1)
    assert elsewhere == {f"/another/place/{image}" for image in held_out(images, 0.2, 1)}


def test_a_larger_share_holds_out_the_same_images_and_more():
    assert held_out(names(20), 0.1, 3) < held_out(names(20), 0.5, 3)


def test_every_image_is_as_likely_as_any_other():
    chosen = [image for seed in range(400) for image in held_out(names(10), 0.2, seed)]
    assert all(50 <= chosen.count(image) <= 110 for image in names(10))
