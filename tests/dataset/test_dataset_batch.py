"""Batches travel whole: every tensor of one goes where the batch goes."""

from dataclasses import fields
from pathlib import Path

import torch
from dataset_samples import config, make_image, section, subset
from torch import Tensor

from library.dataset.batch import Batch
from library.dataset.dataset import Dataset
from library.dataset.loader import load_batch
from library.dataset.plan import Share
from library.models.family import SizeConditioning


def full_batch() -> Batch:
    return Batch(
        images=torch.zeros(1, 3, 8, 8), latents=torch.zeros(1, 4, 1, 1), captions=["a"], text_cond={"hidden": torch.zeros(1, 2, 3)},
        sizes=SizeConditioning(*(torch.zeros(1, 2, dtype=torch.int64) for _ in range(3))), loss_weights=torch.ones(1),
        draw_seeds=[1], image_keys=["a.png"], masks=torch.ones(1, 8, 8), conditioning=torch.zeros(1, 3, 8, 8),
        network_multiplier=0.5, custom_attributes=[{"a": 1}],
    )  # fmt: skip


def test_every_tensor_of_a_batch_is_moved_and_the_rest_stays() -> None:
    batch = full_batch()
    moved = batch.to(torch.device("meta"))
    for field in fields(Batch):
        value = getattr(moved, field.name)
        if isinstance(getattr(batch, field.name), Tensor):
            assert value.device.type == "meta", field.name
    assert moved.text_cond is not None
    assert {tensor.device.type for tensor in moved.text_cond.values()} == {"meta"}
    assert moved.sizes.original_hw.device.type == "meta"
    assert (moved.network_multiplier, moved.custom_attributes) == (0.5, [{"a": 1}])


def test_a_batch_without_masks_and_control_images_has_none() -> None:
    batch = Batch(None, torch.zeros(1, 4, 1, 1), ["a"], None, full_batch().sizes, torch.ones(1), [1], ["a.png"])
    moved = batch.to(torch.device("meta"))
    assert (moved.masks, moved.conditioning, moved.network_multiplier, moved.custom_attributes) == (None, None, 1.0, [])


def test_a_batch_says_how_strongly_the_network_acts_and_what_the_file_says_of_each_image(folder: Path) -> None:
    reg = folder.parent / "reg"
    reg.mkdir()
    make_image(reg / "r.png", seed=9)
    parts = subset(folder), subset(reg, is_reg=True, class_tokens="", custom_attributes={"diff_output_preservation": True})
    dataset = Dataset(config(section(*parts, network_multiplier=0.5, batch_size=8)), seed=0)
    batches = [load_batch(dataset, 1, Share(uses, 1.0)) for uses in dataset.plan(1, 1).batches]
    assert {batch.network_multiplier for batch in batches} == {0.5}
    said = {key: attributes for batch in batches for key, attributes in zip(batch.image_keys, batch.custom_attributes, strict=True)}
    assert said.pop(str(reg / "r.png")) == {"diff_output_preservation": True}
    assert list(said.values()) == [{}] * 5
