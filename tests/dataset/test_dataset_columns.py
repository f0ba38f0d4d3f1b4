"""What is read from columns is what the records of single images say."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from library.dataset.dataset import Dataset
from library.dataset.facts import bucket_info, tag_frequency
from library.dataset.index import Section, build_index
from library.dataset.items import Items
from tests.dataset.dataset_samples import config, section, subset
from tests.dataset.made_up_folder import made_up


@pytest.fixture(params=["buckets", "no_upscale", "one size"])
def found(request: pytest.FixtureRequest) -> Section:
    rng = random.Random(5)
    folders = {name: [(rng.randint(300, 3000), rng.randint(300, 3000)) for _ in range(80)] for name in ("a", "b", "reg")}
    subsets = [subset(Path("a"), num_repeats=2), subset(Path("b"), num_repeats=3), subset(Path("reg"), is_reg=True)]
    options = {"enable_bucket": request.param != "one size", "bucket_no_upscale": request.param == "no_upscale"}
    (section_,) = build_index(config(section(*subsets, resolution=(512, 512), **options)), open_folder=made_up(folders))
    return section_


def test_columns_say_what_the_items_say(found: Section) -> None:
    order = np.random.default_rng(0).permutation(len(found.items)).astype(np.int32)
    shuffled = Items(found.config, 0, 0, found.items._pictures, found.items._choice.where(order))
    for items in (found.items, shuffled):
        records = list(items)
        assert list(items.captions()) == [item.caption for item in records]
        assert list(items.paths()) == [item.path for item in records]
        assert [tags for _, texts in items.tags() for tags in texts] == [item.tags for item in records]
        assert list(map(tuple, items.resized.tolist())) == [item.geometry.resized for item in records]
        assert items.is_reg.tolist() == [item.is_reg for item in records]


def test_facts_are_those_of_the_items(found: Section) -> None:
    items = list(found.items)
    assert found.num_train_uses == sum(item.repeats for item in items if not item.is_reg)
    info = bucket_info(found)
    if info is not None:
        uses = Counter(item.geometry.bucket for item in items for _ in range(item.repeats))
        assert [(tuple(each["resolution"]), each["count"]) for each in info["buckets"].values()] == sorted(uses.items())
        errors = [abs(item.geometry.bucket[0] / item.geometry.bucket[1] - item.size[0] / item.size[1]) for item in items]
        assert info["mean_img_ar_error"] == sum(errors) / len(errors)
    assert list(tag_frequency(found)) == ["a", "b", "reg"]


def test_tags_are_counted_as_one_by_one_in_the_order_they_come(folder: Path) -> None:
    texts = ["B, a,, ΑΣ ,c", "\n", "A,b ,\tΑς", "d, d,D", "İ, ß ,SS"]
    for number, text in enumerate(texts):
        (folder / f"im{number}.txt").write_text(text, encoding="utf-8")
    (found,) = Dataset(config(section(subset(folder))), 1).sections
    expected: dict[str, int] = {}
    for item in found.items:
        for tag in (tag.strip().lower() for tag in item.tags.replace("\n", ",").split(",")):
            if tag:
                expected[tag] = expected.get(tag, 0) + 1
    assert list(tag_frequency(found)["images"].items()) == list(expected.items())
