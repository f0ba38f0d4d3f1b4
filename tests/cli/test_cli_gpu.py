"""Whole runs on a real GPU: they train, draw, save, and go on where they stopped; the memory they needed is told."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.training_commands import FINETUNE, SCRIPT, arguments, finetune_arguments, run_command, weights, write_dataset

pytestmark = pytest.mark.gpu

MEASURES = "cuda"
"""The device on which runs tell of the memory they needed."""
ADAPTERS = ["--cache_latents_to_disk", "--network_train_unet_only", "--cache_text_encoder_outputs"]
EVERYTHING_TRAINED = ["--network_args", "conv_dim=2", "--gradient_checkpointing", "--ema_decay", "0.9"]
WHOLE = ["--train_text_encoder", "--gradient_checkpointing", "--ema_decay", "0.9", "--optimizer_type", "AdamW8bit"]
SWAPPED = ["--gradient_checkpointing", "--fused_backward_pass", "--blocks_to_swap", "6", "--max_grad_norm", "0"]
RUNS = {
    "adapters, bf16": (SCRIPT, ["--mixed_precision", "bf16", *ADAPTERS]),
    "adapters, fp16": (SCRIPT, ["--mixed_precision", "fp16", *EVERYTHING_TRAINED]),
    "adapters on nf4, swapped": (SCRIPT, ["--mixed_precision", "bf16", "--base_quant", "nf4", "--blocks_to_swap", "6", *ADAPTERS]),
    "whole model, bf16": (FINETUNE, ["--mixed_precision", "bf16", *WHOLE]),
    "whole model, bf16 weights, swapped": (FINETUNE, ["--mixed_precision", "bf16", "--full_bf16", *SWAPPED]),
}


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return the events of one kind that a run wrote."""
    found = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [event for event in found if event["kind"] == kind]


def trained(folder: Path) -> torch.Tensor:
    """Return the weights of the last model of a run, float64."""
    file = next(each for each in sorted(folder.glob("*.safetensors")) if "-" not in each.stem)
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(weights(file).items())])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_where_it_stopped_and_tells_what_memory_it_needed(
    name: str, tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    script, more = RUNS[name]
    prompts, dataset = tmp_path / "prompts.txt", write_dataset(tmp_path / "data", photos)
    prompts.write_text("a lake --w 64 --h 64 --s 2\n")
    common = [*more, "--max_data_loader_n_workers", "2", "--max_train_steps", "4", "--save_precision", "float"]
    make = arguments if script == SCRIPT else finetune_arguments

    def run(folder: Path, *own: str) -> Sequence[dict[str, Any]]:
        log = tmp_path / f"{folder.name}.jsonl"
        ended = run_command(make(tiny_checkpoint, dataset, folder, *common, *own, "--log_events", str(log)), script=script)
        assert ended.returncode == 0, ended.stderr
        assert bool(events(log, "memory")) == (MEASURES == "cuda")
        return events(log, "step")

    drawn = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "2"]
    steps = run(tmp_path / "whole", *drawn, "--save_state", "--save_every_n_steps", "2")
    assert len(steps) == 4 and all(math.isfinite(step["loss"]) for step in steps)
    assert list((tmp_path / "whole" / "sample").glob("*.png"))
    state = next((tmp_path / "whole").glob("*step00000002-state"))
    assert len(run(tmp_path / "resumed", "--resume", str(state))) == 2
    one, other = trained(tmp_path / "whole"), trained(tmp_path / "resumed")
    assert float((one - other).norm() / one.norm()) < 1e-2  # a GPU may sum in another order
