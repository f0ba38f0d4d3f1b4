"""A dataset class of one's own makes the batches of a run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from library.dataset.batch import Batch
from library.dataset.foreign import ForeignDataset
from library.dataset.foreign_batch import read_batch
from library.dataset.identity import dataset_identity
from library.dataset.loader import Loader
from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from library.options.dataset_class import class_definition
from library.options.errors import UsageError, UserError
from library.options.groups.dataset import DatasetOptions
from library.options.parse import parse
from library.options.scripts import (
    CacheLatentsOptions,
    SdxlTrainNetworkOptions,
    SdxlTrainOptions,
    SdxlTrainTextualInversionOptions,
    TrainingOptions,
)
from library.training.preflight import open_dataset
from tests.cli.own_dataset import Encoded, Stripes
from tests.cli.training_commands import FINETUNE, arguments, assert_same_bits, run_command, weights

NAME = "tests.cli.own_dataset.Stripes"
ENCODED = "tests.cli.own_dataset.Encoded"


@pytest.fixture(scope="module")
def family(tiny_checkpoint: Path) -> SdxlFamily:
    return SdxlFamily.open(ModelSource(str(tiny_checkpoint)))


def opened(family: SdxlFamily, name: str = NAME, seed: int = 3) -> ForeignDataset:
    options = DatasetOptions(resolution="64")
    return ForeignDataset(name, class_definition(options), seed, family, (None, 75, options.size, False), has_network=True)


def test_a_network_and_a_model_are_trained_on_the_batches_of_a_class(tiny_checkpoint: Path, tmp_path: Path) -> None:
    args = arguments(tiny_checkpoint, Path("unused"), tmp_path / "out", "--dataset_class", NAME, "--resolution", "64", "--flip_aug")
    at = args.index("--dataset_config")
    del args[at : at + 2]
    done = run_command([*args, "--max_train_steps", "4", "--save_every_n_steps", "2", "--save_state"])
    assert done.returncode == 0, done.stderr
    assert f"The batches are made by {NAME}, so --flip_aug has no effect." in done.stderr
    assert "training images × repeats: 6" in done.stderr
    resume = ["--resume", str(tmp_path / "out" / "net-step00000002-state"), "--output_dir", str(tmp_path / "more")]
    done = run_command([*args, "--max_train_steps", "4", *resume])
    assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "out" / "net.safetensors", tmp_path / "more" / "net.safetensors")
    assert any(tensor.any() for name, tensor in weights(tmp_path / "out" / "net.safetensors").items() if "lora_up" in name)
    for flag in ("--network_module", "--network_dim", "--network_dropout"):
        at = args.index(flag)
        del args[at : at + 2]
    args[args.index(NAME)] = ENCODED  # neither VAE nor text encoders are there
    done = run_command([*args, "--max_train_steps", "1", "--output_dir", str(tmp_path / "model")], script=FINETUNE)
    assert done.returncode == 0, done.stderr


def drawn(dataset: ForeignDataset, epoch: int, **more: Any) -> list[Batch]:
    return list(Loader(dataset, **more).epoch(epoch))


def test_the_class_and_its_number_of_batches_tell_runs_apart(family: SdxlFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dataset_identity(opened(family), 1)
    assert before["all datasets"]["number of batches"] == len(opened(family).own)
    monkeypatch.setattr(Stripes, "__len__", lambda self: 2)
    assert dataset_identity(opened(family), 1) == before | {"all datasets": before["all datasets"] | {"number of batches": 2}}


def test_order_and_draws_depend_on_seed_and_epoch_alone(family: SdxlFamily) -> None:
    dataset = opened(family)
    dataset.own[0]  # draws
    ours, theirs = drawn(dataset, 2), drawn(opened(family), 2, num_workers=2)
    for one, other in zip(ours, theirs, strict=True):
        assert one.images is not None and other.images is not None
        assert torch.equal(one.images, other.images) and one.draw_seeds == other.draw_seeds
    assert sorted(batch.image_keys[0] for batch in ours) == [f"batch {number} of {NAME}" for number in range(3)]
    assert dataset.own.epochs[-1] == 2
    assert len({seed for batch in ours for seed in batch.draw_seeds}) == 6
    orders = [[batch.captions[1] for batch in drawn(dataset, epoch)] for epoch in range(1, 6)]
    assert len({tuple(order) for order in orders}) > 1


def test_two_processes_share_the_batches_and_the_last_one_is_weighed_for_both(family: SdxlFamily) -> None:
    first, second = (drawn(opened(family), 1, process_index=process, num_processes=2) for process in (0, 1))
    assert len(first) == len(second) == 2
    assert {batch.captions[1] for batch in [*first, *second]} == {f"stripes {number}" for number in range(3)}
    totals = sorted([one.loss_weights[0].item(), other.loss_weights[0].item()] for one, other in zip(first, second, strict=True))
    assert totals == [[1.0, 1.0], [2.0, 0.0]]


def test_the_first_batch_decides_what_all_have_to_bring(family: SdxlFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, encoded = opened(family), opened(family, ENCODED)
    assert not plain.brings_latents and not plain.brings_texts
    assert encoded.brings_latents and encoded.brings_texts
    assert len(drawn(encoded, 1)) == 3
    whole = Encoded.__getitem__
    for key, lacking in (("latents", {"latents": None, "images": torch.zeros(2, 3, 64, 64)}), ("text_encoder_outputs_list", {})):
        given = {**lacking, key: None}
        monkeypatch.setattr(Encoded, "__getitem__", lambda self, n, g=given: whole(self, n) | (g if n == 2 else {}))
        with pytest.raises(UserError, match=f"{key} of batch 2 of {ENCODED} is missing, but the first batch has it"):
            drawn(encoded, 1)
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("script", "more", "words"),
    [
        (
            SdxlTrainNetworkOptions,
            "--network_module networks.lora --network_train_text_encoder_only",
            "--network_train_text_encoder_only cannot be used: the batches of",
        ),
        (SdxlTrainOptions, "--train_text_encoder", "--train_text_encoder cannot be used: the batches of"),
        (
            SdxlTrainTextualInversionOptions,
            "--token_string word --init_word stripe --num_vectors_per_token 1",
            "a new word is learned from captions",
        ),
    ],
)
def test_text_encoders_are_not_trained_on_outputs_that_are_there(
    script: type[TrainingOptions], more: str, words: str, family: SdxlFamily
) -> None:
    line = f"--pretrained_model_name_or_path a/b --output_dir o --resolution 64 --dataset_class {ENCODED} {more}"
    options = parse(script, line.split())
    with pytest.raises(UserError) as told:
        open_dataset(options, class_definition(options.dataset), 1, family, 1)
    assert words in str(told.value) and f"{ENCODED} bring text_encoder_outputs_list" in str(told.value)


def changed(**fields: Any) -> dict[str, Any]:
    return {key: value for key, value in (Stripes(None, 75, (64, 64), False)[0] | fields).items() if value is not ...}


def test_latents_texts_masks_and_attributes_are_handed_on(family: SdxlFamily) -> None:
    texts = [torch.ones(2, 77, 64, dtype=torch.float16), torch.ones(2, 77, 128), torch.ones(2, 128)]
    attributes = [{"diff_output_preservation": True}, {}]
    given = changed(
        images=...,
        captions=...,
        latents=torch.zeros(2, 4, 8, 8),
        alpha_masks=torch.ones(2, 64, 64),
        text_encoder_outputs_list=texts,
        custom_attributes=attributes,
        network_multipliers=[0.5, 0.5],
        original_sizes_hw=[(10, 20), (30, 40)],
    )
    batch = read_batch(given, "b", family, has_network=True)
    assert batch.images is None and batch.latents is not None and batch.masks is not None and batch.text_cond is not None
    assert {name: tuple(tensor.shape[1:]) for name, tensor in batch.text_cond.items()} == {
        "hidden1": (77, 64),
        "hidden2": (77, 128),
        "pool2": (128,),
    }
    assert batch.custom_attributes == attributes and batch.network_multiplier == 0.5
    assert batch.sizes.original_hw.tolist() == [[10, 20], [30, 40]]
    assert batch.loss_weights.tolist() == [1.0, 0.5]


WRONG = {
    "images": [..., torch.zeros(2, 3, 60, 64), torch.full((2, 3, 64, 64), 255.0), torch.zeros(2, 64, 64, 3), "a.png"],
    "latents": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 6, 8)],
    "captions": [..., ["one"], [1, 2]],
    "text_encoder_outputs_list": [
        [torch.zeros(2, 77, 64)],
        [torch.zeros(1, 77, 64)] * 3,
        [torch.zeros(2, 77, 768), torch.zeros(2, 77, 1280), torch.zeros(2, 1280)],
        [torch.zeros(2, 77, 64), torch.zeros(2, 154, 128), torch.zeros(2, 128)],
        [torch.zeros(2, 77, 64), torch.zeros(2, 77, 128), torch.zeros(2, 1, 128)],
    ],
    "loss_weights": [torch.ones(3), "heavy"],
    "original_sizes_hw": [..., torch.zeros(2)],
    "target_sizes_hw": [None],
    "alpha_masks": [torch.ones(2, 1, 64, 64)],
    "network_multipliers": [torch.tensor([1.0, 0.5]), torch.full((2,), 0.5)],
    "custom_attributes": [{}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_batch_that_cannot_be_trained_on_is_told_with_its_key(key: str, value: Any, family: SdxlFamily) -> None:
    with pytest.raises(UserError, match=f"--dataset_class: {key} of batch 7 of {NAME} "):
        read_batch(changed(**{key: value}), f"batch 7 of {NAME}", family, has_network=False)


def test_control_images_that_are_followed_are_there_and_as_large_as_the_pictures(family: SdxlFamily) -> None:
    latents = {"images": ..., "latents": torch.zeros(2, 4, 8, 8)}
    for pictures in ({}, latents):
        fitting = changed(conditioning_images=torch.zeros(2, 3, 64, 64), **pictures)
        assert read_batch(fitting, "b", family, has_network=True, follows_images=True).conditioning is not None
        other = changed(conditioning_images=torch.zeros(2, 3, 64, 96), **pictures)
        assert read_batch(other, "b", family, has_network=True).conditioning is not None, "masks are resized"
        with pytest.raises(
            UserError, match=r"conditioning_images of b must be as large as the pictures, \(64, 64\), not \(64, 96\)"
        ):
            read_batch(other, "b", family, has_network=True, follows_images=True)
        with pytest.raises(UserError, match="conditioning_images of b is missing"):
            read_batch(changed(**pictures), "b", family, has_network=True, follows_images=True)


class WithoutLength:
    """Cannot be counted."""

    def __init__(self, *made_of: Any) -> None:
        del made_of

    def __getitem__(self, number: int) -> Any:
        return []


class Lists(WithoutLength):
    """Gives lists in place of dictionaries."""

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_package.Class", "the module no_such_package cannot be imported: No module named"),
        ("tests.cli.own_dataset.Stripe", "has no class Stripe; it has Stripes"),
        ("torch.utils.data.Dataset", "is made with four arguments"),
        ("tests.cli.test_cli_dataset_class.WithoutLength", "has no __len__"),
        ("tests.cli.test_cli_dataset_class.Lists", "must be a dictionary, but it is a list"),
    ],
)
def test_a_class_that_cannot_be_used_is_told(name: str, words: str, family: SdxlFamily) -> None:
    with pytest.raises(UserError) as told:
        opened(family, name)
    assert words in str(told.value) and name in str(told.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--dataset_config d.toml --train_data_dir d", "so --dataset_config and --train_data_dir would name images nobody reads"),
        ("--cache_latents", "--cache_latents cannot be used with --dataset_class"),
        ("--cache_text_encoder_outputs", "--cache_text_encoder_outputs cannot be used with --dataset_class"),
        ("--validation_split 0.1", "--validation_split cannot be used with --dataset_class"),
        ("--dataset_report r", "--dataset_report cannot be used with --dataset_class"),
        ("--debug_dataset", "--debug_dataset cannot be used with --dataset_class"),
    ],
)
def test_what_needs_our_own_dataset_is_refused(more: str, words: str) -> None:
    line = f"--pretrained_model_name_or_path a/b --output_dir o --network_module networks.lora --dataset_class {NAME} {more}"
    with pytest.raises(UsageError) as told:
        parse(SdxlTrainNetworkOptions, line.split())
    assert words in " ".join(told.value.problems) and len(told.value.problems) == 1


def test_the_caching_tools_refuse_a_class_and_its_path_needs_a_dot() -> None:
    with pytest.raises(UsageError, match="nothing to cache"):
        parse(CacheLatentsOptions, f"--pretrained_model_name_or_path a/b --dataset_class {NAME}".split())
    line = "--pretrained_model_name_or_path a/b --output_dir o --network_module networks.lora --dataset_class Stripes"
    with pytest.raises(UsageError, match="must be a dotted path"):
        parse(SdxlTrainNetworkOptions, line.split())
