"""`--ema_decay` from the command line to the file beside the model, in both training scripts."""

from pathlib import Path

import torch

from tests.cli.training_commands import (
    FINETUNE,
    arguments,
    assert_same_bits,
    finetune_arguments,
    run_command,
    weights,
    write_dataset,
)

STEPS = ["--max_train_steps", "3", "--save_every_n_steps", "1", "--ema_decay", "0.25"]


def test_a_whole_model_is_averaged_over_its_steps(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, photos, count=2)
    done = run_command(finetune_arguments(tiny_checkpoint, dataset, tmp_path / "out", *STEPS), script=FINETUNE)
    assert done.returncode == 0, done.stderr
    passed = [weights(tiny_checkpoint)] + [weights(tmp_path / "out" / f"model-step0000000{step}.safetensors") for step in (1, 2, 3)]
    found = weights(tmp_path / "out" / "model-ema.safetensors")
    assert found.keys() == passed[-1].keys()
    moved = 0
    for name, tensor in found.items():
        average = passed[0][name].double()
        for n, after in enumerate(passed[1:], start=1):
            keep = min(0.25, (1 + n) / (10 + n))
            average = keep * average + (1 - keep) * after[name].double()
        torch.testing.assert_close(tensor.double(), average, rtol=1e-5, atol=1e-7)
        moved += not torch.equal(tensor, passed[-1][name])
    assert moved > 100


def test_a_resumed_network_has_the_average_of_the_whole_run(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, photos, count=2)
    whole, again, plain = (tmp_path / name for name in ("whole", "again", "plain"))
    resumed = ["--resume", str(whole / "net-step00000002-state")]
    for out, more in {whole: [*STEPS, "--save_state"], again: [*STEPS, *resumed], plain: STEPS[:2]}.items():
        done = run_command(arguments(tiny_checkpoint, dataset, out, *more))
        assert done.returncode == 0, done.stderr
    assert_same_bits(whole / "net.safetensors", plain / "net.safetensors")
    assert_same_bits(whole / "net-ema.safetensors", again / "net-ema.safetensors")
    last, average = weights(whole / "net.safetensors"), weights(whole / "net-ema.safetensors")
    assert last.keys() == average.keys()
    assert any(not torch.equal(last[name], average[name]) for name in last)
