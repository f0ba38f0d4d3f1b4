"""Images held out of training, as a dataset of files gives them."""

import json
import shutil
from pathlib import Path

import pytest
from dataset_samples import FakeFamily, FakeVae, config, make_image, section, subset

from library.dataset.captions import settled_caption
from library.dataset.dataset import Dataset
from library.dataset.facts import bucket_info, folders, tag_frequency
from library.dataset.loader import Loader, load_batch
from library.dataset.plan import Share
from library.options.dataset_config import CaptionRules
from library.options.errors import UserError


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Ten pictures of two shapes."""
    images = tmp_path / "cats"
    images.mkdir()
    for number in range(10):
        make_image(images / f"{number}.png", (64, 64) if number % 2 else (96, 64), seed=number)
        (images / f"{number}.txt").write_text(f"picture {number}, tag\n")
    return images


def split(dataset: Dataset) -> tuple[set[str], set[str]]:
    return {item.path for item in dataset.items}, {item.path for item in dataset.held_out}


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_no_image_is_in_both_parts_and_none_is_lost(many: Path, seed: int | None) -> None:
    data = config(section(subset(many, validation_split=0.2, validation_seed=seed, num_repeats=3), enable_bucket=True))
    dataset = Dataset(data, seed=1)
    trained, held = split(dataset)
    assert not trained & held
    assert trained | held == {str(path) for path in many.glob("*.png")}
    assert len(held) == 2
    assert [item.number for item in dataset.encoded_items] == list(range(10))
    assert all(item.repeats == 1 for item in dataset.held_out)
    assert dataset.num_uses == 8 * 3
    uses = [use for batch in dataset.plan(1, 1).batches for use in batch]
    assert {dataset.item_of(use).path for use in uses} == trained
    assert {dataset.item_of(use).path for batch in dataset.held_out_batches() for use in batch} == held


def test_the_seed_of_the_subset_wins_over_that_of_the_run(many: Path) -> None:
    def held(run_seed: int, own: int | None) -> set[str]:
        return split(Dataset(config(section(subset(many, validation_split=0.3, validation_seed=own))), run_seed))[1]

    assert held(1, 5) == held(2, 5)
    assert len({frozenset(held(seed, None)) for seed in range(6)}) > 1


def test_one_folder_at_two_sizes_is_split_alike(many: Path) -> None:
    sized = [section(subset(many, validation_split=0.2), resolution=(size, size)) for size in (64, 96)]
    dataset = Dataset(config(*sized), seed=3)
    first, second = dataset.sections
    assert {item.path for item in first.held_out} == {item.path for item in second.held_out}
    assert [item.number for item in dataset.items] == list(range(16))
    assert [item.number for item in dataset.held_out] == list(range(16, 20))


def test_a_batch_says_which_dataset_it_is_of(many: Path) -> None:
    part = subset(many, validation_split=0.2)
    dataset = Dataset(config(section(part), section(part, resolution=(32, 32))), seed=3)
    sizes = {batch.section: tuple(batch.images.shape[-2:]) for batch in Loader(dataset).held_out() if batch.images is not None}
    assert sizes == {0: (64, 64), 1: (32, 32)}


def test_what_one_dataset_holds_out_no_other_trains_on(many: Path, caplog: pytest.LogCaptureFixture) -> None:
    sections = section(subset(many, validation_split=0.2)), section(subset(many), resolution=(96, 96))
    dataset = Dataset(config(*sections), seed=3)
    trained, held = split(dataset)
    assert len(held) == 2
    assert not trained & held
    assert "trained on nowhere because another dataset or subset holds them out for validation: 2." in caplog.text


def test_regularisation_images_are_never_held_out(many: Path, tmp_path: Path) -> None:
    reg = tmp_path / "reg"
    reg.mkdir()
    for number in range(4):
        make_image(reg / f"r{number}.png", seed=number)
    parts = subset(many, validation_split=0.5), subset(reg, is_reg=True, class_tokens="cat", validation_split=0.5)
    dataset = Dataset(config(section(*parts)), seed=0)
    assert {Path(item.path).parent.name for item in dataset.held_out} == {"cats"}
    assert sum(item.is_reg for item in dataset.items) == 4
    assert sum(item.repeats for item in dataset.items if item.is_reg) == 5  # as many as are trained on, not as there are


def test_images_of_a_metadata_file_are_split_too(many: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps({path.name: {"caption": path.stem} for path in many.glob("*.png")}))
    dataset = Dataset(config(section(subset(many, metadata_file=str(file), validation_split=0.2))), seed=0)
    trained, held = split(dataset)
    assert (len(trained), len(held), len(trained & held)) == (8, 2, 0)
    assert all(item.caption == Path(item.path).stem for item in dataset.encoded_items)


def test_what_is_recorded_counts_only_what_is_trained(many: Path) -> None:
    dataset = Dataset(config(section(subset(many, validation_split=0.2, num_repeats=2), enable_bucket=True)), seed=0)
    (only,) = dataset.sections
    assert only.num_train_uses == 16
    assert folders(dataset, is_reg=False) == {"cats": {"n_repeats": 2, "img_count": 8}}
    tags = tag_frequency(only)["cats"]
    assert tags["tag"] == 8
    assert not {item.caption.split(",")[0] for item in dataset.held_out} & tags.keys()
    info = bucket_info(only)
    assert info is not None
    assert sum(bucket["count"] for bucket in info["buckets"].values()) == 16


def test_a_held_out_image_is_loaded_as_it_is_every_time(many: Path) -> None:
    chance = {"flip_aug": True, "shuffle_caption": True, "caption_dropout_rate": 0.5, "caption_tag_dropout_rate": 0.5}
    dataset = Dataset(config(section(subset(many, validation_split=0.2, **chance))), seed=0)
    plain = Dataset(config(section(subset(many, validation_split=0.2))), seed=0)
    (uses,) = dataset.held_out_batches()
    for epoch in range(1, 6):
        batch = load_batch(dataset, epoch, Share(uses, 1.0))
        expected = load_batch(plain, 1, Share(uses, 1.0)) if plain.num_uses == dataset.num_uses else None
        assert expected is not None
        assert batch.images is not None
        assert expected.images is not None
        assert batch.images.equal(expected.images)
        assert batch.captions == expected.captions == [item.caption for item in map(dataset.item_of, uses)]
        assert batch.draw_seeds == expected.draw_seeds


@pytest.mark.parametrize(
    ("rules", "text", "expected"),
    [
        (CaptionRules(shuffle_caption=True, keep_tokens_separator="|||"), "a ||| c, b ||| z", "a, c, b, z"),
        (CaptionRules(enable_wildcard=True), "one {x|y}\ntwo", "one x"),
        (CaptionRules(caption_dropout_rate=0.99, caption_tag_dropout_rate=0.99), "a, b", "a, b"),
        (CaptionRules(caption_dropout_rate=1.0), "a, b", ""),
        (CaptionRules(caption_dropout_every_n_epochs=2, caption_prefix="p"), "a", "p a"),
        (CaptionRules(token_warmup_step=100, token_warmup_min=1), "a, b, c", "a, b, c"),
    ],
)
def test_nothing_in_a_settled_caption_is_left_to_chance(rules: CaptionRules, text: str, expected: str) -> None:
    assert settled_caption(text, rules) == expected


def test_caches_hold_held_out_images(many: Path, family: FakeFamily, vae: FakeVae) -> None:
    import torch

    from library.dataset.latent_cache import cache_latents
    from library.dataset.latent_encoder import LatentEncoder
    from library.dataset.text_cache import TextEncoder, cache_text_outputs
    from library.options.groups.cache import CacheOptions

    dataset = Dataset(config(section(subset(many, validation_split=0.2))), seed=0)
    cpu = torch.device("cpu")
    options = CacheOptions(cache_latents=True, cache_text_encoder_outputs=True)
    cache_latents(dataset, family, LatentEncoder(family, lambda: vae, cpu, torch.float32, seed=0), options)
    cache_text_outputs(dataset, TextEncoder(family, list, cpu, torch.float32, 75), options, trust_foreign=True)
    assert vae.seen == 10
    assert sorted(family.encoded_texts) == sorted(item.caption for item in dataset.encoded_items)
    (uses,) = dataset.held_out_batches()
    assert load_batch(dataset, 1, Share(uses, 1.0)).latents is not None


def test_held_out_batches_are_the_same_for_any_number_of_workers_and_processes(many: Path) -> None:
    dataset = Dataset(config(section(subset(many, validation_split=0.7, shuffle_caption=True), batch_size=2)), seed=0)

    def keys(**options: int) -> list[tuple[str, ...]]:
        loader = Loader(dataset, **options)
        first = [tuple(batch.image_keys) for batch in loader.held_out()]
        assert first == [tuple(batch.image_keys) for batch in loader.held_out()]
        return first

    alone = keys()
    assert sorted(key for batch in alone for key in batch) == sorted(item.path for item in dataset.held_out)
    assert [len(batch) for batch in alone].count(2) == 3
    assert keys(num_workers=2) == alone
    assert [keys(num_processes=2, process_index=process) for process in (0, 1)] == [alone[::2], alone[1::2]]
    assert [tuple(batch.image_keys) for batch in Loader(dataset).held_out(2)] == alone[:2]


def test_loading_held_out_images_disturbs_no_epoch(many: Path) -> None:
    dataset = Dataset(config(section(subset(many, validation_split=0.4))), seed=0)
    epoch, held_out = Loader(dataset, num_workers=2, persistent=True), Loader(dataset, num_workers=2)
    plain = [batch.image_keys for batch in epoch.epoch(1)]
    mixed = []
    for batch in epoch.epoch(1):
        mixed.append(batch.image_keys)
        assert [loaded.loss_weights.tolist() for loaded in held_out.held_out()] == [[1.0, 1.0], [1.0, 1.0]]
    assert mixed == plain


def test_images_with_masks_are_split_with_them(many: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in many.glob("*.png"):
        shutil.copy(path, masks)
    parts = subset(many, validation_split=0.2, conditioning_data_dir=str(masks))
    dataset = Dataset(config(section(parts)), seed=0)
    trained, held = split(dataset)
    assert (len(trained), len(held), len(trained & held)) == (8, 2, 0)
    assert all(item.conditioning_path == str(masks / Path(item.path).name) for item in dataset.encoded_items)
    (uses,) = dataset.held_out_batches()
    batch = load_batch(dataset, 1, Share(uses, 1.0))
    assert batch.conditioning is not None
    assert batch.images is not None
    assert batch.conditioning.equal(batch.images)  # a copy of the picture as its mask lies exactly over it


def test_a_remembered_folder_is_split_as_before_and_its_memory_holds_all_images(many: Path) -> None:
    data = config(section(subset(many, validation_split=0.2, cache_info=True)))
    first, again = Dataset(data, seed=0), Dataset(data, seed=0)
    remembered = json.loads((many / "metadata_cache.json").read_text(encoding="utf-8"))
    assert len(remembered) == 10
    assert split(again) == split(first)
    assert split(again)[0] | split(again)[1] == {str(path) for path in many.glob("*.png")}
    for dataset in (first, again):
        assert all(item.caption == f"picture {Path(item.path).stem}, tag" for item in dataset.encoded_items)


def test_images_that_subsets_hold_out_of_each_other_are_told_as_such(many: Path, tmp_path: Path) -> None:
    """Of two files that share out a folder, each holding out one, nothing need be left."""
    for name in ("two", "reg"):
        (tmp_path / name).mkdir()
    for number in range(2):
        make_image(tmp_path / "two" / f"{number}.png")
        make_image(tmp_path / "reg" / f"{number}.png")
    chosen: dict[bool, int] = {}
    for seed in range(20):  # one seed holds out the first image, another the second
        halves = subset(tmp_path / "two", class_tokens="x", validation_split=0.5, validation_seed=seed)
        (held,) = Dataset(config(section(halves)), 1).held_out
        chosen.setdefault(held.path.endswith("0.png"), seed)
    both = [subset(tmp_path / "two", class_tokens="x", validation_split=0.5, validation_seed=seed) for seed in chosen.values()]
    reg = subset(tmp_path / "reg", class_tokens="x", is_reg=True)
    for subsets in (both, [*both, reg]):
        with pytest.raises(UserError, match="All images to train on are held out") as caught:
            Dataset(config(section(*subsets)), 1)
        assert "is_reg" not in str(caught.value)


@pytest.mark.parametrize("own", [None, 4])
def test_another_choice_of_held_out_images_finds_all_in_the_cache(
    many: Path, family: FakeFamily, vae: FakeVae, own: int | None
) -> None:
    import torch

    from library.dataset.latent_cache import cache_latents
    from library.dataset.latent_encoder import LatentEncoder
    from library.dataset.text_cache import cache_text_outputs
    from library.dataset.text_encoder import TextEncoder
    from library.options.groups.cache import CacheOptions

    cpu = torch.device("cpu")
    options = CacheOptions(cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True, text_cache_variants=3)
    made, choices = [], set()
    for seed in range(4):
        data = config(section(subset(many, validation_split=0.3, validation_seed=own, shuffle_caption=True, flip_aug=True)))
        dataset = Dataset(data, seed)
        choices.add(frozenset(split(dataset)[1]))
        images = LatentEncoder(family, lambda: vae, cpu, torch.float32, seed=seed, batch_size=2)
        texts = TextEncoder(family, lambda: [None], cpu, torch.float32, family.max_token_length, batch_size=2)
        reports = cache_latents(dataset, family, images, options), cache_text_outputs(dataset, texts, options, trust_foreign=True)
        made.append([report.made.total() for report in reports])
        for batch in dataset.held_out_batches():
            assert load_batch(dataset, 1, Share(batch, 1.0)).text_cond is not None
    assert len(choices) == (1 if own else 4)
    assert made[0][0] == 10
    assert made[0][1] >= 10
    assert made[1:] == [[0, 0]] * 3
