"""What the training scripts do about losses that are not finite and about full memory, as a person sees it."""

import json
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.cli.training_commands import FINETUNE, arguments, finetune_arguments, run_command, run_processes, write_dataset


def spoil(number: int) -> None:
    """Make the cached latents of one batch useless."""
    from library.training import loop

    calls, train_on = count(), loop.accumulate_gradient

    def spoiled(run: Any, sent: Any, *more: Any) -> Any:
        if next(calls) == number:
            sent = run.send(replace(sent.batch, latents=sent.batch.latents * torch.nan))
        return train_on(run, sent, *more)

    loop.accumulate_gradient = spoiled


def test_a_network_stops_at_a_spoiled_batch_and_goes_on_from_what_was_saved(
    tmp_path: Path, photos: Path, tiny_checkpoint: Path
) -> None:
    dataset, events = write_dataset(tmp_path, photos), tmp_path / "events.jsonl"
    more = ["--cache_latents", "--network_train_unet_only", "--log_events", str(events)]
    args = arguments(tiny_checkpoint, dataset, tmp_path / "out", *more)
    done = run_command(args, prepare=partial(spoil, 2))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "The loss of step 3 is not finite." in done.stderr
    assert ".jpg (timestep" in done.stderr and "loss nan)" in done.stderr
    assert "first module whose output was not finite: denoiser: " in done.stderr
    state = tmp_path / "out" / "net-step00000002-state"
    assert f"--resume {state}" in done.stderr and state.is_dir() and not (tmp_path / "out" / "net.safetensors").exists()
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / "net-step00000002.safetensors").values())
    told = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    assert [each["outcome"] for each in told if each["kind"] == "end"] == ["failed"]
    assert any(each["kind"] == "error" and "The loss of step 3" in each["message"] for each in told)
    went_on = run_command([*args, "--resume", str(state)])
    assert went_on.returncode == 0 and (tmp_path / "out" / "net.safetensors").is_file(), went_on.stderr


def run_out_of_memory(number: int) -> None:
    """Leave no memory for one batch."""
    from library.training import loop

    calls, train_on = count(), loop.accumulate_gradient

    def crowded(*arguments: Any) -> Any:
        if next(calls) == number:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return train_on(*arguments)

    loop.accumulate_gradient = crowded


def test_full_memory_tells_what_was_in_it_and_leaves_what_was_saved(tmp_path: Path, photos: Path, tiny_checkpoint: Path) -> None:
    args = arguments(tiny_checkpoint, write_dataset(tmp_path, photos), tmp_path / "out", "--save_every_n_steps", "1")
    done = run_command(args, prepare=partial(run_out_of_memory, 1))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "Memory is full: it happened while it trained." in done.stderr and "Tried to allocate 20.00 GiB" in done.stderr
    for part in ("trained weights: ", "frozen weights of the U-Net: ", "weights of the VAE: ", "optimizer state: "):
        assert part in done.stderr
    assert "--gradient_checkpointing: " in done.stderr and "a smaller batch size than 2" in done.stderr
    assert load_file(tmp_path / "out" / "net-step00000001.safetensors")


def test_several_processes_leave_out_the_same_update(tmp_path: Path, photos: Path, tiny_checkpoint: Path) -> None:
    dataset = write_dataset(tmp_path, photos, batch_size=1)
    more = ["--cache_latents", "--network_train_unet_only", "--max_train_steps", "3", "--on_non_finite", "skip"]
    done = run_processes(arguments(tiny_checkpoint, dataset, tmp_path / "out", *more), prepare=partial(spoil, 1))
    assert done.returncode == 0, done.stderr
    assert "The loss of step 2 is not finite. That update was left out" in done.stdout + done.stderr
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / "net.safetensors").values())


def test_a_fine_tuning_with_a_rate_far_too_large_stops_and_says_what_may_help(
    tmp_path: Path, photos: Path, tiny_checkpoint: Path
) -> None:
    dataset = write_dataset(tmp_path, photos)
    more = ["--cache_latents", "--learning_rate", "1e30", "--fused_backward_pass", "--max_grad_norm", "0"]
    done = run_command(finetune_arguments(tiny_checkpoint, dataset, tmp_path / "out", *more), script=FINETUNE)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "The loss of step 2 is not finite." in done.stderr and "The weights before it, of step 1, are finite" in done.stderr
    assert "--max_grad_norm 1" in done.stderr and "a lower --learning_rate than 1e+30" in done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()
