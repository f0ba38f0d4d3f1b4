"""The plan of an epoch, and batches that depend on nothing but seed and epoch."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dataset_samples import config, make_image, make_loader, section, subset
from hypothesis import given, settings
from hypothesis import strategies as st

from library.dataset.batch import Batch
from library.dataset.dataset import Dataset
from library.dataset.loader import Loader
from library.dataset.plan import EpochPlan, draw_seed, plan_epoch
from library.options.errors import UserError
from library.options.groups.dataset import DatasetOptions
from library.options.groups.length import LengthOptions
from library.training import loader as training_loader
from library.training.outputs import RunLength


def bucketed(folder: Path, *, seed: int = 1, batch_size: int = 2, repeats: int = 3, **rules: object) -> Dataset:
    return Dataset(config(section(subset(folder, num_repeats=repeats, **rules), enable_bucket=True, batch_size=batch_size)), seed)


def signature(batch: Batch) -> tuple[object, ...]:
    assert batch.images is not None
    sizes = batch.sizes
    return (
        batch.captions, batch.draw_seeds, batch.image_keys, batch.loss_weights.tolist(), batch.images.numpy().tobytes(),
        sizes.original_hw.tolist(), sizes.crop_top_left.tolist(), sizes.target_hw.tolist(),
    )  # fmt: skip


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 2**64),
    st.integers(1, 99),
)
@settings(max_examples=50)
def test_each_use_occurs_once_and_weights_make_the_mean_exact(
    counts: list[int], batch_size: int, processes: int, seed: int, epoch: int
) -> None:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    groups = [list(range(end - count, end)) for end, count in zip(ends, counts, strict=True)]
    plan = plan_epoch(groups, [batch_size * processes] * len(groups), seed, epoch)
    assert sorted(use for batch in plan.batches for use in batch) == list(range(ends[-1]))
    for number, batch in enumerate(plan.batches):
        shares = [plan.share(number, rank, processes) for rank in range(processes)]
        assert max(len(share.uses) for share in shares) <= batch_size
        assert Counter(use for share in shares if share.weight for use in share.uses) == Counter(batch)
        loss = sum(share.weight * sum(share.uses) / len(share.uses) for share in shares) / processes
        assert loss == pytest.approx(sum(batch) / len(batch))


def test_a_process_left_without_an_image_gets_a_filler_of_no_weight() -> None:
    plan = EpochPlan(1, ((7,),))
    assert plan.share(0, 0, 2).weight == 2
    assert plan.share(0, 1, 2).uses == (7,)
    assert plan.share(0, 1, 2).weight == 0


def test_epochs_and_seeds_give_other_orders_and_the_same_ones_again() -> None:
    def batches(seed: int, epoch: int) -> tuple[tuple[int, ...], ...]:
        return plan_epoch([range(20)], [4], seed, epoch).batches

    assert batches(1, 1) == batches(1, 1)
    assert len({batches(1, 1), batches(1, 2), batches(2, 1)}) == 3


def test_batches_of_all_buckets_are_mixed() -> None:
    batches = plan_epoch([range(20), range(20, 40)], [2, 2], seed=0, epoch=1).batches
    of_first = [batch[0] < 20 for batch in batches]
    assert True in of_first[:10]
    assert False in of_first[:10]


def test_draw_seeds_are_63_bits_and_differ_in_every_argument() -> None:
    seeds = [draw_seed(s, e, u) for s in (0, 1, 2**64 - 1) for e in (1, 2) for u in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_images_of_a_batch_share_bucket_and_dataset(folder: Path) -> None:
    two = config(section(subset(folder), enable_bucket=True), section(subset(folder), resolution=(32, 32)))
    dataset = Dataset(two, 1)
    for batch in dataset.plan(1, 1).batches:
        items = [dataset.items[dataset.use_items[use]] for use in batch]
        assert len({(item.section, item.geometry.bucket) for item in items}) == 1
    assert dataset.num_images == 10


def test_batches_are_counted_by_bucket(folder: Path) -> None:
    dataset = bucketed(folder, repeats=3)
    for processes in (1, 2, 3):
        expected = sum(-(-len(uses) // (2 * processes)) for uses in dataset.buckets.values())
        assert dataset.batches_per_epoch(processes) == expected == len(dataset.plan(1, processes).batches)


def test_batches_are_the_same_whatever_the_number_of_workers(folder: Path) -> None:
    dataset = bucketed(folder, flip_aug=True, shuffle_caption=True, caption_dropout_rate=0.2)
    alone = [signature(batch) for batch in make_loader(dataset, 2)]
    assert [signature(batch) for batch in make_loader(dataset, 2, num_workers=2)] == alone


def test_persistent_workers_follow_the_epoch_and_skip_what_was_trained(folder: Path) -> None:
    dataset = bucketed(folder, flip_aug=True)
    loader = Loader(dataset, num_workers=2, persistent=True)
    for epoch, start in [(1, 0), (2, 0), (2, 3)]:
        expected = [signature(batch) for batch in make_loader(dataset, epoch)][start:]
        assert [signature(batch) for batch in loader.epoch(epoch, start)] == expected


def test_skipped_batches_are_not_loaded(folder: Path) -> None:
    dataset = bucketed(folder, repeats=1, batch_size=1)
    first = next(iter(make_loader(dataset, 1))).image_keys[0]
    Path(first).unlink()
    assert len(list(make_loader(dataset, 1, start_batch=1))) == dataset.batches_per_epoch(1) - 1
    with pytest.raises(UserError, match=Path(first).name):
        list(make_loader(dataset, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_became_unreadable_is_named(folder: Path, workers: int) -> None:
    dataset = bucketed(folder)
    (folder / "im3.png").write_bytes(b"broken")
    with pytest.raises(UserError) as caught:
        list(make_loader(dataset, 1, num_workers=workers))
    assert "im3.png is not a picture" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_loading_takes_nothing_from_torchs_own_generator(folder: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(make_loader(bucketed(folder), 1, num_workers=1))
    assert torch.equal(before, torch.get_rng_state())


def test_draws_depend_on_the_image_not_on_batch_size_or_processes(folder: Path) -> None:
    def draws(batch_size: int, processes: int) -> set[tuple[str, int, str]]:
        dataset = bucketed(folder, batch_size=batch_size, shuffle_caption=True)
        batches = [
            batch
            for rank in range(processes)
            for batch in make_loader(dataset, 1, process_index=rank, num_processes=processes)
            if batch.loss_weights.any()
        ]
        return {row for batch in batches for row in zip(batch.image_keys, batch.draw_seeds, batch.captions, strict=True)}

    assert draws(4, 1) == draws(2, 2) == draws(1, 1)
    assert len(draws(1, 1)) == 15


def test_two_processes_share_the_batches_one_would_have(folder: Path) -> None:
    one, two = bucketed(folder, batch_size=4), bucketed(folder, batch_size=2)
    for whole, first, second in zip(
        make_loader(one, 1),
        make_loader(two, 1, process_index=0, num_processes=2),
        make_loader(two, 1, process_index=1, num_processes=2),
        strict=True,
    ):
        kept = first.draw_seeds + (second.draw_seeds if second.loss_weights.any() else [])
        assert kept == whole.draw_seeds


def test_flips_mirror_the_image_and_its_crop(tmp_path: Path) -> None:
    for number in range(8):
        make_image(tmp_path / f"w{number}.png", (70, 64))
    dataset = Dataset(config(section(subset(tmp_path, class_tokens="", flip_aug=True, num_repeats=4), batch_size=1)), 5)
    upright, mirrored = {}, {}
    for batch in make_loader(dataset, 1):
        use = dataset.use_items.index(next(item.number for item in dataset.items if item.path == batch.image_keys[0]))
        assert batch.images is not None
        target = mirrored if batch.images[0, 0, 0, 0] > batch.images[0, 0, 0, -1] else upright
        target[use] = batch
    assert upright
    assert mirrored
    use = (upright.keys() & mirrored.keys()).pop()
    assert torch.equal(upright[use].images.flip(-1), mirrored[use].images)
    geometry = dataset.items[0].geometry
    assert upright[use].sizes.crop_top_left.tolist() == [[int(geometry.crop_ltrb[1]), int(geometry.crop_ltrb[0])]]
    assert mirrored[use].sizes.crop_top_left.tolist() == [[int(geometry.crop_ltrb[1]), int(64 - geometry.crop_ltrb[2])]]


def test_sizes_are_height_before_width(folder: Path) -> None:
    dataset = bucketed(folder, repeats=1, batch_size=1)
    batch = next(batch for batch in make_loader(dataset, 1) if batch.image_keys[0].endswith("im4.png"))
    assert batch.sizes.original_hw.tolist() == [[64, 128]]
    assert batch.sizes.target_hw.tolist() == [[batch.images.shape[2], batch.images.shape[3]]]


def test_regularisation_images_carry_their_weight(folder: Path, tmp_path: Path) -> None:
    reg = tmp_path / "reg"
    reg.mkdir()
    make_image(reg / "r.png")
    parts = section(subset(folder), subset(reg, is_reg=True, class_tokens="dog"))
    batches = list(make_loader(Dataset(config(parts, prior_loss_weight=0.25), 1), 1))
    weights = {
        (key, weight) for batch in batches for key, weight in zip(batch.image_keys, batch.loss_weights.tolist(), strict=True)
    }
    assert {weight for key, weight in weights if key.endswith("r.png")} == {0.25}
    assert {weight for key, weight in weights if not key.endswith("r.png")} == {1.0}


@pytest.mark.parametrize("workers", [0, 1])
def test_captions_grow_with_the_updates_of_the_tag_warm_up_across_epochs_and_after_a_resume(folder: Path, workers: int) -> None:
    dataset = bucketed(folder, repeats=1, batch_size=1, token_warmup_min=0, token_warmup_step=0.5)
    batches, accumulation = dataset.batches_per_epoch(1), 2
    assert batches == 5  # three updates an epoch, of which the last has one batch
    loader = Loader(dataset, num_workers=workers, accumulation=accumulation, total_updates=12)
    lengths = [len([*filter(None, batch.captions[0].split(", "))]) for epoch in (1, 2, 3) for batch in loader.epoch(epoch)]
    updates = [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8]
    assert lengths == [min(update * 3 // 6, 3) for update in updates]
    resumed = [len([*filter(None, batch.captions[0].split(", "))]) for batch in loader.epoch(2, 2)]
    assert resumed == lengths[7:10]


def test_training_tells_the_loader_how_long_it_is_and_what_an_update_is(folder: Path) -> None:
    dataset = bucketed(folder, repeats=1, batch_size=1, token_warmup_min=0, token_warmup_step=0.5)
    options = SimpleNamespace(
        dataset=DatasetOptions(max_data_loader_n_workers=0), length=LengthOptions(gradient_accumulation_steps=2)
    )
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    length = RunLength.of(dataset.batches_per_epoch(1), 2, 12, None)
    setting: Any = SimpleNamespace(options=options, accelerator=accelerator, dataset=dataset, length=length)
    loader = training_loader.make_loader(setting, persistent=False)
    lengths = [len([*filter(None, batch.captions[0].split(", "))]) for epoch in (1, 2) for batch in loader.epoch(epoch)]
    assert lengths == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
