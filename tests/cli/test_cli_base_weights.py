"""`--base_weights` from the command line to the file: what is trained on, which text is cached, and what the file says of it."""

from pathlib import Path

import torch
from safetensors import safe_open

from tests.cli.training_commands import arguments, run_command, weights, write_dataset

ONE_STEP = ["--max_train_steps", "1", "--network_dropout", "0"]
DISK = "--cache_text_encoder_outputs_to_disk"


def test_a_network_is_trained_on_top_of_others(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, photos, batch_size=2, count=2)
    fixed = dataset.read_text().replace("shuffle_caption = true\n", "").replace("caption_tag_dropout_rate = 0.2\n", "")
    dataset.write_text(fixed, encoding="utf-8")
    base = tmp_path / "base" / "net.safetensors"
    merged = ["--base_weights", str(base), str(base), "--base_weights_multiplier", "0.5"]
    said = {}
    runs = {"base": ["--learning_rate", "0.1", "--max_train_steps", "2"], "plain": [DISK], "merged": [DISK, *merged]}
    for name, more in runs.items():
        done = run_command(arguments(tiny_checkpoint, dataset, tmp_path / name, *ONE_STEP, *more))
        assert done.returncode == 0, done.stderr
        said[name] = done.stderr
    assert f"--base_weights: {base} at strength 0.5 changes " in said["merged"]
    assert f"--base_weights: {base} at strength 1 changes " in said["merged"]
    assert "2 encoded (2 of other text encoders)" in said["merged"]
    plain, found = (weights(tmp_path / name / "net.safetensors") for name in ("plain", "merged"))
    assert plain.keys() == found.keys()
    assert any(not torch.equal(plain[name], found[name]) for name in plain)
    with safe_open(tmp_path / "merged" / "net.safetensors", "pt") as file:
        told = file.metadata()
    assert told["ss_base_weights"] == '["net.safetensors", "net.safetensors"]'
    assert told["ss_base_weights_multiplier"] == "[0.5, 1.0]"
