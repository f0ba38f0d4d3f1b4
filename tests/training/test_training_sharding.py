"""Optimizers on shares of parameters, and states of shares, in two processes."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.options.checks_distributed import SHARDED_OPTIMIZERS
from library.training.full_tensors import full_optimizer_state, full_tensors, gathered, shares_of_module, shares_of_optimizer_state
from tests.cli.training_commands import warm_processes


class Small(nn.Module):
    """Layers whose sizes two does not divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.scale = nn.Linear(12, 7), nn.Linear(7, 5), nn.LayerNorm(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh()) * self.scale.weight + self.scale.bias


def steps(model: nn.Module, optimizer: Any, numbers: range, share: slice = slice(None)) -> None:
    for number in numbers:
        drawn = torch.randn(8, 17, generator=torch.Generator().manual_seed(number))[share]
        ((model(drawn[:, :12]) - drawn[:, 12:]) ** 2).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()


def largest_difference(path: str, share: slice) -> float:
    """Train in two processes, by way of a saved state in the middle, and return the largest difference from one process."""
    from torch.distributed.fsdp import fully_shard

    module, _, name = path.rpartition(".")
    make = getattr(importlib.import_module(module), name)
    whole = Small()
    steps(whole, make(whole.parameters(), lr=0.01), range(3))

    def divided() -> tuple[nn.Module, Any]:
        model = Small()
        fully_shard(model.first)
        fully_shard(model)
        return model, make(model.parameters(), lr=0.01)

    model, optimizer = divided()
    steps(model, optimizer, range(2), share)
    with gathered(model, optimizer, keep=True):
        tensors, state = dict(full_tensors(model)), full_optimizer_state(optimizer)
    assert all(type(tensor) is torch.Tensor for kept in state["state"].values() for tensor in kept.values())
    model, optimizer = divided()
    model.load_state_dict(shares_of_module(tensors, model))
    optimizer.load_state_dict(shares_of_optimizer_state(state, optimizer))
    steps(model, optimizer, range(2, 3), share)
    with gathered(model, None, keep=True):
        ours = dict(full_tensors(model))
    return max(float((ours[key] - tensor).abs().max()) for key, tensor in whole.state_dict().items())


def work(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {path: largest_difference(path, slice(rank * 4, rank * 4 + 4)) for path in SHARDED_OPTIMIZERS}
    Path(folder, f"found{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def test_optimizers_take_the_same_steps_on_shares_and_go_on_from_saved_ones(tmp_path: Path) -> None:
    started = [warm_processes().Process(target=work, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    found = json.loads((tmp_path / "found0.json").read_text(encoding="utf-8"))
    assert {path: difference for path, difference in found.items() if difference > 1e-6} == {}
    assert len(found) == len(SHARDED_OPTIMIZERS)
