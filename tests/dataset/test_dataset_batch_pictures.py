"""The first batches as pictures: what training sees, and what it is told."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dataset_samples import config, make_image, section, subset
from PIL import Image

from library.dataset.batch_pictures import MOST_BATCHES, write_batches
from library.dataset.contact_sheet import contact_sheet, to_picture
from library.dataset.dataset import Dataset
from library.dataset.loader import Loader


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "batches.jsonl").read_text().splitlines()]


def test_sheets_show_the_pixels_that_training_sees(folder: Path, tmp_path: Path) -> None:
    dataset = Dataset(config(section(subset(folder, flip_aug=True, shuffle_caption=True), batch_size=2)), 3)
    count = write_batches(tmp_path / "out", dataset)
    batches = list(Loader(dataset).epoch(1))
    assert count == len(batches) == len(list((tmp_path / "out").glob("*.png"))) == 3
    for number, batch in enumerate(batches, start=1):
        with Image.open(tmp_path / "out" / f"batch-{number:03d}.png") as sheet:
            shown = np.asarray(sheet.convert("RGB"))[8:72, 8:72]
        assert batch.images is not None
        expected = ((batch.images[0].numpy().transpose(1, 2, 0) + 1) / 2 * 255).round()
        assert np.abs(shown - expected).max() <= 1


def test_lines_say_what_training_is_told(folder: Path, tmp_path: Path) -> None:
    reg = tmp_path / "reg"
    reg.mkdir()
    make_image(reg / "r.png", (80, 40))
    subsets = subset(folder, flip_aug=True, shuffle_caption=True), subset(reg, is_reg=True, class_tokens="a class")
    dataset = Dataset(config(section(*subsets, enable_bucket=True), prior_loss_weight=0.25), 3)
    write_batches(tmp_path / "out", dataset)
    told = lines(tmp_path / "out")
    batches = list(Loader(dataset).epoch(1))
    assert [line["image"] for line in told] == [key for batch in batches for key in batch.image_keys]
    assert [line["caption"] for line in told] == [caption for batch in batches for caption in batch.captions]
    assert [line["loss_weight"] for line in told] == [weight for batch in batches for weight in batch.loss_weights.tolist()]
    assert {line["loss_weight"] for line in told} == {1.0, 0.25}
    assert {line["flipped"] for line in told} == {True, False}
    wide = next(line for line in told if line["image"].endswith("im4.png"))
    assert wide["original_size"] == [128, 64] and wide["target_size"] == [64, 64] and wide["cropped_at"] == [32, 0]
    assert not wide["has_mask"]


def test_masks_stand_beside_their_pictures(folder: Path, tmp_path: Path) -> None:
    with Image.open(folder / "im0.png") as image:
        image.putalpha(Image.fromarray(np.pad(np.full((32, 64), 255, np.uint8), ((32, 0), (0, 0)))))
        image.save(folder / "im0.png")
    dataset = Dataset(config(section(subset(folder, alpha_mask=True), batch_size=5)), 0)
    write_batches(tmp_path / "out", dataset)
    (batch,) = Loader(dataset).epoch(1)
    place = next(number for number, key in enumerate(batch.image_keys) if key.endswith("im0.png"))
    assert all(line["has_mask"] for line in lines(tmp_path / "out"))
    with Image.open(tmp_path / "out" / "batch-001.png") as sheet:
        cell = np.asarray(sheet.convert("L"))[:, place * sheet.width // 5 :]
    assert cell[8:40, 80:144].max() == 0
    assert cell[40:72, 80:144].min() == 255


def test_control_images_stand_beside_their_pictures(folder: Path, tmp_path: Path) -> None:
    controls = tmp_path / "controls"
    controls.mkdir()
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            Image.new("RGB", image.size, "red").save(controls / path.name)
    dataset = Dataset(config(section(subset(folder, conditioning_data_dir=str(controls)), batch_size=5)), 0)
    write_batches(tmp_path / "out", dataset)
    assert all(line["has_conditioning_image"] and not line["has_mask"] for line in lines(tmp_path / "out"))
    with Image.open(tmp_path / "out" / "batch-001.png") as sheet:
        assert (np.asarray(sheet)[8:72, 80:144] == (255, 0, 0)).all()


def test_batches_are_bounded_and_earlier_sheets_go(folder: Path, tmp_path: Path) -> None:
    many = Dataset(config(section(subset(folder, num_repeats=6), batch_size=1)), 0)
    assert write_batches(tmp_path, many) == MOST_BATCHES == len(list(tmp_path.glob("batch-*.png")))
    (tmp_path / "notes.png").touch()
    assert write_batches(tmp_path, Dataset(config(section(subset(folder), batch_size=5)), 0)) == 1
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["batch-001.png", "notes.png"]


def test_the_warm_up_of_tags_is_seen(folder: Path, tmp_path: Path) -> None:
    dataset = Dataset(config(section(subset(folder, token_warmup_step=4.0), batch_size=1)), 0)
    write_batches(tmp_path, dataset, accumulation=2, total_updates=10)
    assert [len(line["caption"].split(", ")) for line in lines(tmp_path)] == [1, 1, 1, 1, 2]


def test_values_become_pictures() -> None:
    ramp = torch.linspace(-1, 1, 256).reshape(1, 1, 256).expand(3, 4, 256)
    assert np.asarray(to_picture(ramp))[0, :, 0].tolist() == list(range(256))
    assert np.asarray(to_picture(torch.tensor([[0.0, 0.5, 1.0]])))[0, :, 0].tolist() == [0, 128, 255]


def test_a_sheet_grows_in_rows_and_large_pictures_shrink(folder: Path) -> None:
    for number in range(3):
        make_image(folder / f"large{number}.png", (1024, 1024))
        (folder / f"large{number}.txt").write_text("猫 🐱 and many words " * 30, encoding="utf-8")
    dataset = Dataset(config(section(subset(folder), resolution=(1024, 1024), batch_size=8)), 0)
    (batch,) = islice(Loader(dataset).epoch(1), 1)
    sheet = contact_sheet(batch, [str(number) for number in range(8)])
    assert sheet.width <= 2048 and sheet.height > 2 * 512
