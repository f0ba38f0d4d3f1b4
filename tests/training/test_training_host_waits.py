"""Nothing in the training loop waits for the device; what would is seen on a CPU too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.training.host_waits import watched, watching
from tests.cli.training_commands import arguments, run_command, write_dataset

WAITS = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool((x > 0).all()),
    "to the host": lambda x: (x * 2).cpu(),
    "to the host by name": lambda x: x.to("cpu"),
    "a list": lambda x: x.view(-1).tolist(),
    "numpy": lambda x: x.exp().numpy(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "in the backward pass": lambda x: Backward.apply(x.requires_grad_()).sum().backward(),
}


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * gradient.max().item()


@pytest.mark.parametrize("name", WAITS)
def test_what_needs_a_value_of_the_device_is_seen_with_its_place(name: str) -> None:
    x = torch.ones(3)
    with watching([x]) as known:
        WAITS[name](x)
    assert sum(known.found.values()) == 1
    assert next(iter(known.found)).startswith("tests/training/test_training_host_waits.py:")


def test_values_of_the_host_and_work_that_stays_on_the_device_are_no_waits() -> None:
    x = torch.ones(3)
    with watching([x]) as known:
        steps = torch.tensor(2.0)
        steps += 1
        x.mul_(steps.item()).view(-1)[torch.tensor([0, 1])].sum()
        torch.arange(4).tolist()
    assert not known.found


def watch_training() -> None:
    """Let a script say where its loop waits."""
    from library.training import recipe

    train = recipe.train

    def train_watched(run: Any, *more: Any) -> Any:
        with watched(run) as found:
            end = train(run, *more)
        print("WAITS", json.dumps(found))
        return end

    recipe.train = train_watched


def waits(said: str) -> dict[str, int]:
    return dict(json.loads(said.split("WAITS", 1)[1]))


def test_ten_steps_of_a_network_with_all_logs_wait_for_nothing(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, photos, count=4)
    more = ["--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only", "--max_train_steps", "10"]
    more += [
        "--logging_dir",
        str(tmp_path / "logs"),
        "--log_grad_norm",
        "--log_events",
        str(tmp_path / "events.jsonl"),
        "--loss_ledger",
        "--max_grad_norm",
        "1",
    ]
    done = run_command(arguments(tiny_checkpoint, dataset, tmp_path / "out", *more), prepare=watch_training)
    assert done.returncode == 0, done.stderr
    found = waits(done.stdout)
    assert found, "saving waits"
    assert not {place for place in found if not place.startswith("library/files/")}
