"""Held-out images and their loss, as a person runs it with both training scripts."""

from pathlib import Path

import pytest
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.cli.training_commands import (
    FINETUNE,
    arguments,
    assert_same_bits,
    finetune_arguments,
    run_command,
    write_dataset,
)

SPLIT = ["--validation_split", "0.4", "--validation_seed", "3"]


def scalars(logs: Path) -> dict[str, list[tuple[int, float]]]:
    (folder,) = logs.glob("*/*")
    events = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_measuring_the_loss_changes_no_bit_of_the_network(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, photos)
    bf16 = ["--mixed_precision", "bf16", "--max_train_steps", "3"]
    often = [*SPLIT, "--validate_every_n_steps", "1", "--logging_dir", str(tmp_path / "logs"), "--max_validation_steps", "1"]
    measured = run_command(arguments(tiny_checkpoint, dataset, tmp_path / "measured", *bf16, *often))
    assert measured.returncode == 0, measured.stderr
    assert "training images × repeats: 3" in measured.stderr
    assert "validation images: 2" in measured.stderr
    rarely = [*SPLIT, "--validate_every_n_epochs", "99"]
    unmeasured = run_command(arguments(tiny_checkpoint, dataset, tmp_path / "unmeasured", *bf16, *rarely))
    assert unmeasured.returncode == 0, unmeasured.stderr
    with safe_open(tmp_path / "measured" / "net.safetensors", "pt") as file:
        assert file.metadata()["ss_num_validation_images"] == "2"
    assert_same_bits(tmp_path / "measured" / "net.safetensors", tmp_path / "unmeasured" / "net.safetensors")

    found = scalars(tmp_path / "logs")
    averages = dict(found["loss/validation/step_average"])
    assert list(averages) == [1, 2, 3]
    assert len(set(averages.values())) == 3
    training = dict(found["loss/average"])
    for step, divergence in found["loss/validation/step_divergence"]:
        assert divergence == pytest.approx(averages[step] - training[step], abs=1e-6)
    (epoch,) = found["loss/validation/epoch_average"]
    assert epoch == (1, averages[2])


def test_a_model_is_measured_too_and_what_holds_nothing_out_is_told(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, photos)
    dataset.write_text(dataset.read_text().replace("[general]", "[general]\nvalidation_split = 0.4"), encoding="utf-8")
    logs = ["--logging_dir", str(tmp_path / "logs"), "--max_train_steps", "2", "--validate_every_n_steps", "2"]
    done = run_command(finetune_arguments(tiny_checkpoint, dataset, tmp_path / "out", *logs), script=FINETUNE)
    assert done.returncode == 0, done.stderr
    ((step, value),) = scalars(tmp_path / "logs")["loss/validation/step_average"]
    assert step == 2 and 0 < value < 10

    whole = write_dataset(tmp_path / "whole", photos, count=1)
    more = ["--max_train_steps", "1", "--validate_every_n_steps", "2"]
    done = run_command(finetune_arguments(tiny_checkpoint, whole, tmp_path / "out2", *more), script=FINETUNE)
    assert done.returncode == 0, done.stderr
    assert "No images are held out, so --validate_every_n_steps has no effect." in done.stderr


def test_a_share_that_leaves_nothing_to_train_on_is_refused(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, photos)
    done = run_command(arguments(tiny_checkpoint, dataset, tmp_path / "out", "--validation_split", "1"))
    assert done.returncode == 2
    assert "--validation_split" in done.stderr
    dataset.write_text(dataset.read_text().replace("[general]", "[general]\nvalidation_split = 1.0"), encoding="utf-8")
    done = run_command(arguments(tiny_checkpoint, dataset, tmp_path / "out"))
    assert done.returncode == 2
    assert "validation_split" in done.stderr and "something has to be left to train on" in done.stderr
