"""Number types and memory, as a person asks for them: runs that hold less, and train all the same."""

from pathlib import Path

from safetensors import safe_open

from tests.cli.training_commands import arguments, run_command, weights, write_dataset


def test_a_network_is_trained_drawn_and_measured_beside_a_model_in_8_bits(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    dataset = write_dataset(tmp_path, photos, count=3)
    (tmp_path / "prompts.txt").write_text("a red house --d 3 --s 1\n")
    more = ["--fp8_base", "--mixed_precision", "bf16", "--gradient_checkpointing", "--max_train_steps", "2"]
    more += ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2"]
    more += ["--validation_split", "0.34", "--validate_every_n_steps", "2", "--max_validation_steps", "1"]
    done = run_command(arguments(tiny_checkpoint, dataset, tmp_path / "out", *more))
    assert done.returncode == 0, done.stderr
    ups = {name: tensor for name, tensor in weights(tmp_path / "out" / "net.safetensors").items() if "lora_up" in name}
    assert all(tensor.isfinite().all() for tensor in ups.values())
    assert all(any(tensor.any() for name, tensor in ups.items() if part in name) for part in ("te1", "te2", "unet"))
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
    assert "Validation loss" in done.stderr
    with safe_open(tmp_path / "out" / "net.safetensors", "pt") as file:
        assert file.metadata()["ss_fp8_base"] == "True"
