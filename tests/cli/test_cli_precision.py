"""Number types and memory, as a person asks for them: runs that hold less, and train all the same."""

from pathlib import Path

from safetensors import safe_open

from tests.cli.training_commands import arguments, assert_same_bits, run_command, weights, write_dataset


def test_a_network_is_trained_drawn_measured_and_resumed_beside_a_model_in_few_bits(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    dataset = write_dataset(tmp_path, photos, count=3)
    (tmp_path / "prompts.txt").write_text("a red house --d 3 --s 1\n")
    base = ["--base_quant", "nf4", "--mixed_precision", "bf16", "--gradient_checkpointing", "--max_train_steps", "2"]
    base += ["--optimizer_type", "AdamW8bit", "--validation_split", "0.34"]
    more = [*base, "--blocks_to_swap", "12", "--save_every_n_steps", "1", "--save_state"]
    more += ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2"]
    more += ["--validate_every_n_steps", "2", "--max_validation_steps", "1"]
    done = run_command(arguments(tiny_checkpoint, dataset, tmp_path / "out", *more))
    assert done.returncode == 0, done.stderr
    ups = {name: tensor for name, tensor in weights(tmp_path / "out" / "net.safetensors").items() if "lora_up" in name}
    assert all(tensor.isfinite().all() for tensor in ups.values())
    assert all(any(tensor.any() for name, tensor in ups.items() if part in name) for part in ("te1", "te2", "unet"))
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
    assert "Validation loss" in done.stderr
    with safe_open(tmp_path / "out" / "net.safetensors", "pt") as file:
        assert file.metadata()["ss_base_quant"] == "nf4"
    state = str(tmp_path / "out" / "net-step00000001-state")
    done = run_command(arguments(tiny_checkpoint, dataset, tmp_path / "resumed", *base, "--resume", state))
    assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "resumed" / "net.safetensors", tmp_path / "out" / "net.safetensors")


def test_compiled_blocks_and_activations_in_main_memory_change_no_bit_and_a_run_resumes_without_a_compiler(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    dataset = write_dataset(tmp_path, photos, count=4)
    dataset.write_text(dataset.read_text().replace("enable_bucket = true", "enable_bucket = false"))
    base = ["--network_train_unet_only", "--gradient_checkpointing", "--cache_latents", "--max_train_steps", "2", "--torch_compile"]
    more = [*base, "--dynamo_backend", "eager", "--cpu_offload_checkpointing", "--checkpoint_fraction", "0.5"]
    more += ["--blocks_to_swap", "20", "--save_every_n_steps", "1", "--save_state"]
    compiled = run_command(arguments(tiny_checkpoint, dataset, tmp_path / "compiled", *more))
    assert compiled.returncode == 0, compiled.stderr
    assert "blocks with eager for 1 shapes" in compiled.stderr
    # The second step is made once more, by blocks that are not compiled and keep everything where it is.
    more = [*base, "--dynamo_backend", "tvm", "--resume", str(tmp_path / "compiled" / "net-step00000001-state")]
    resumed = run_command(arguments(tiny_checkpoint, dataset, tmp_path / "resumed", *more))
    assert resumed.returncode == 0, resumed.stderr
    assert "--torch_compile: tvm cannot compile the model (" in resumed.stderr and "Traceback" not in resumed.stderr
    assert_same_bits(tmp_path / "resumed" / "net.safetensors", tmp_path / "compiled" / "net.safetensors")
