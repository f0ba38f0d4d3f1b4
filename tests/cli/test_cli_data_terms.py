"""What a dataset file says about the loss, from the file to the trained weights."""

from pathlib import Path

import torch

from tests.cli.training_commands import FINETUNE, arguments, finetune_arguments, run_command, weights, write_dataset

STEPS = ["--max_train_steps", "3"]


def with_key(dataset: Path, line: str) -> Path:
    """Write a copy of the dataset file with one more line in its subset."""
    changed = dataset.with_name("changed.toml")
    changed.write_text(f"{dataset.read_text()}{line}\n", encoding="utf-8")
    return changed


def test_preserved_images_and_the_strength_of_the_network_change_what_is_learned(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    plain = write_dataset(tmp_path, photos)
    preserving = with_key(plain, "custom_attributes = { diff_output_preservation = true }")
    stronger = plain.with_name("stronger.toml")
    stronger.write_text(plain.read_text().replace("batch_size =", "network_multiplier = 3\nbatch_size ="), encoding="utf-8")
    learned = {}
    for name, dataset in {"plain": plain, "preserving": preserving, "stronger": stronger}.items():
        done = run_command(arguments(tiny_checkpoint, dataset, tmp_path / name, *STEPS, "--network_dropout", "0"))
        assert done.returncode == 0, done.stderr
        assert (f"held to the model without the network: {tmp_path}" in done.stderr) is (name == "preserving")
        assert ("network strength 3 for one dataset or more" in done.stderr) is (name == "stronger")
        learned[name] = weights(tmp_path / name / "net.safetensors")
    ups = [name for name in learned["plain"] if "lora_up" in name]
    assert any(learned["plain"][name].any() for name in ups)
    assert not any(learned["preserving"][name].any() for name in ups)  # it started as the model itself, and nothing pulls it away
    assert any(not torch.equal(learned["plain"][name], learned["stronger"][name]) for name in ups)


def test_what_needs_a_network_is_refused_without_one(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    dataset = with_key(write_dataset(tmp_path, photos), "custom_attributes = { diff_output_preservation = true }")
    dataset.write_text(dataset.read_text().replace("batch_size =", "network_multiplier = 3\nbatch_size ="), encoding="utf-8")
    done = run_command(finetune_arguments(tiny_checkpoint, dataset, tmp_path / "out"), script=FINETUNE)
    assert done.returncode == 2
    assert "network_multiplier of the dataset with" in done.stderr
    assert "diff_output_preservation of" in done.stderr
