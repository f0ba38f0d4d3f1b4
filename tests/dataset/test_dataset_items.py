"""Images held as columns, and the records that are read from them."""

import pickle
from pathlib import Path

import pytest
from dataset_samples import config, make_image, section, subset
from hypothesis import given
from hypothesis import strategies as st

from library.dataset.columns import Texts
from library.dataset.dataset import Dataset
from library.dataset.index import build_index


@given(st.lists(st.text(st.characters(), max_size=20), max_size=20))
def test_packed_texts_come_out_as_they_went_in(texts: list[str]) -> None:
    packed = Texts(texts)
    assert list(packed) == texts
    assert len(packed) == len(texts)
    assert packed[1:] == texts[1:]
    if texts:
        assert packed[-1] == texts[-1]


def test_a_place_beyond_the_last_text_is_an_error() -> None:
    with pytest.raises(IndexError):
        Texts(["a"])[1]


def test_items_are_a_sequence_of_equal_records(folder: Path) -> None:
    (found,) = build_index(config(section(subset(folder, num_repeats=3), enable_bucket=True)))
    items = list(found.items)
    assert [found.items[position] for position in range(5)] == items
    assert found.items[-1] == items[4]
    assert found.items[1:3] == items[1:3]
    assert [item.number for item in items] == [0, 1, 2, 3, 4]
    assert {item.repeats for item in items} == {3}
    assert [item.geometry.bucket for item in items] == [tuple(bucket) for bucket in found.items.buckets.tolist()]
    with pytest.raises(IndexError):
        found.items[5]


def test_items_survive_the_way_to_a_worker(folder: Path) -> None:
    dataset = Dataset(config(section(subset(folder)), section(subset(folder), resolution=(32, 32))), 1)
    assert list(pickle.loads(pickle.dumps(dataset.items))) == list(dataset.items)


def test_items_of_several_datasets_follow_each_other(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    make_image(other / "x.png")
    dataset = Dataset(config(section(subset(folder)), section(subset(other, class_tokens="x")), section(subset(folder))), 1)
    assert [item.number for item in dataset.items] == list(range(11))
    assert [item.section for item in dataset.items] == [0] * 5 + [1] + [2] * 5
    assert [dataset.items[position].number for position in range(11)] == list(range(11))
    assert dataset.items[5].path == str(other / "x.png")
    assert dataset.items[-1] == dataset.items[10]
