"""Each image is seen as often as it repeats, and batches are the same, whatever the number of workers and processes."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dataset_samples import config, section, subset
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_folder import made_up

from library.dataset import dataset as dataset_module
from library.dataset import loader as loader_module
from library.dataset.batch import Batch
from library.dataset.dataset import Dataset
from library.dataset.index import build_index
from library.dataset.loader import Loader

SIZES = st.lists(st.sampled_from([(64, 64), (128, 64), (64, 128), (96, 80)]), min_size=1, max_size=9)


def dataset_of(
    folders: dict[str, list[tuple[int, int]]], repeats: list[int], monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> Dataset:
    """Build a dataset of images that are nowhere, one subset a folder, the last one of regularisation images."""
    parts = [
        subset(folder, num_repeats=count, is_reg=number > 0 and number == len(folders) - 1)
        for number, (folder, count) in enumerate(zip(folders, repeats, strict=True))
    ]
    open_folder = made_up(folders)
    monkeypatch.setattr(
        dataset_module, "build_index", lambda *given, **named: build_index(*given, **named, open_folder=open_folder)
    )
    return Dataset(config(section(*parts, enable_bucket=True, **changes)), seed=3)


@settings(max_examples=60)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=3),
    repeats=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    batch_size=st.integers(1, 4),
    processes=st.integers(1, 3),
    epoch=st.integers(1, 5),
)
def test_each_repeat_of_each_image_is_planned_once(
    sizes: list[list[tuple[int, int]]], repeats: list[int], batch_size: int, processes: int, epoch: int
) -> None:
    folders = {f"folder{number}": own for number, own in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        dataset = dataset_of(folders, repeats[: len(folders)], patch, batch_size=batch_size)
    plan = dataset.plan(epoch, processes)
    shares = [plan.share(number, rank, processes) for number in range(len(plan.batches)) for rank in range(processes)]
    seen = Counter(dataset.use_items[use] for share in shares if share.weight for use in share.uses)
    assert seen == {item.number: item.repeats for item in dataset.items}
    for share in shares:
        assert len({dataset.item_of(use).geometry.bucket for use in share.uses}) == 1
        assert len(share.uses) <= batch_size


@settings(max_examples=40)
@given(
    sizes=SIZES,
    processes=st.integers(1, 2),
    accumulation=st.integers(1, 3),
    epoch=st.integers(1, 3),
    data=st.data(),
)
def test_a_run_goes_on_with_the_batch_it_was_to_train_on(
    sizes: list[tuple[int, int]], processes: int, accumulation: int, epoch: int, data: st.DataObject
) -> None:
    def asked_for(start: int, rank: int) -> list[tuple[Any, ...]]:
        loader = Loader(dataset, process_index=rank, num_processes=processes, accumulation=accumulation, total_updates=99)
        return list(loader.epoch(epoch, start))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        dataset = dataset_of({"folder": sizes}, [2], patch, batch_size=1)
        patch.setattr(loader_module, "load_batch", lambda _, *request, **more: (*request, *more.values()))
        start = data.draw(st.integers(0, dataset.batches_per_epoch(processes)))
        for rank in range(processes):
            whole = asked_for(0, rank)
            assert asked_for(start, rank) == whole[start:]
            updates_an_epoch = -(-len(whole) // accumulation)
            assert [request[2] for request in whole] == [
                (epoch - 1) * updates_an_epoch + number // accumulation for number in range(len(whole))
            ]


def shown(batch: Batch) -> tuple[Any, ...]:
    assert batch.images is not None
    return (
        batch.image_keys, batch.captions, batch.draw_seeds, batch.loss_weights.tolist(), batch.images.numpy().tobytes(),
        batch.sizes.crop_top_left.tolist(),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("processes", [1, 2])
def test_workers_change_no_batch_and_leave_out_or_repeat_no_image(
    folder: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module.os, "cpu_count", lambda: 8)
    parts = subset(folder, num_repeats=3, flip_aug=True, shuffle_caption=True, caption_dropout_rate=0.2)
    dataset = Dataset(config(section(parts, enable_bucket=True)), seed=2)
    expected: dict[tuple[int, int], list[Any]] = {}
    for workers in (0, 1, 4, 8):
        for epoch in (1, 2):
            seen: Counter[str] = Counter()
            seeds = []
            for rank in range(processes):
                loader = Loader(dataset, process_index=rank, num_processes=processes, num_workers=workers)
                batches = list(loader.epoch(epoch))
                assert [shown(batch) for batch in batches] == expected.setdefault((epoch, rank), [shown(b) for b in batches])
                for batch in batches:
                    if batch.loss_weights.any():
                        seen.update(batch.image_keys)
                        seeds += batch.draw_seeds
            assert seen == {item.path: 3 for item in dataset.items}
            assert len(set(seeds)) == 15
