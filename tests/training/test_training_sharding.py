"""Optimizers on shares of parameters, and states of shares, in two processes."""

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.options.checks_distributed import SHARDED_OPTIMIZERS
from library.options.groups.distributed import DistributedOptions
from library.options.scripts import SdxlTrainOptions
from library.training.dry_run import why_not
from library.training.full_tensors import (
    full_optimizer_state,
    full_tensors,
    gather,
    load_full_tensors,
    shares_of_optimizer_state,
)
from library.training.zero_state import DividedShares, ZeroOptimizer
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
    gathered = gather(model, optimizer, keep=True)
    tensors, state = dict(full_tensors(model, gathered)), full_optimizer_state(optimizer, gathered)
    assert all(type(tensor) is torch.Tensor for kept in state["state"].values() for tensor in kept.values())
    model, optimizer = divided()
    load_full_tensors(tensors, model)
    optimizer.load_state_dict(shares_of_optimizer_state(state, optimizer))
    steps(model, optimizer, range(2, 3), share)
    ours = dict(full_tensors(model, gather(model, None, keep=True)))
    return max(float((ours[key] - tensor).abs().max()) for key, tensor in whole.state_dict().items())


class CutInHalves:
    """What is read of DeepSpeed's stage 3: every parameter is cut into parts of one size, one for each of two processes."""

    def __init__(self, parameters: list[Any], rank: int) -> None:
        self.grad_position: dict[int, tuple[int, int, int]] = {}
        parts = []
        for parameter in parameters:
            parameter.ds_numel, parameter.ds_shape = parameter.numel(), parameter.shape
            size = -(-parameter.numel() // 2)
            self.grad_position[id(parameter)] = (0, sum(map(len, parts)), size)
            filled = torch.zeros(2 * size)
            filled[: parameter.numel()] = parameter.detach().flatten()
            parts.append(filled[rank * size : (rank + 1) * size])
        self.fp32_partitioned_groups_flat = [torch.cat(parts)]
        self.get_param_id = id
        self.num_refreshed = 0

    def refresh_fp32_params(self) -> None:
        self.num_refreshed += 1


def state_of_halves(rank: int) -> dict[str, Any]:
    """Say what becomes of the state of an optimizer that steps halves, saved and loaded again."""
    parameters = list(Small().parameters())
    inner = CutInHalves(parameters, rank)
    (share,) = inner.fp32_partitioned_groups_flat

    def over_halves() -> tuple[torch.optim.Optimizer, ZeroOptimizer]:
        optimizer = torch.optim.Adam([share], lr=0.5)
        return optimizer, ZeroOptimizer(optimizer, inner, [parameters], DividedShares(inner))

    optimizer, seen = over_halves()
    share.grad = share.clone()
    optimizer.step()
    saved = seen.whole_state(keep=rank == 0)
    box = [saved]
    torch.distributed.broadcast_object_list(box, src=0)
    again, taken_up = over_halves()
    taken_up.load_state_dict(box[0] or {})
    whole = [state["exp_avg"] for state in (box[0] or {})["state"].values()]
    return {
        "kept": saved is not None,
        "is_whole": all(torch.allclose(mean, 0.1 * each, atol=1e-6) for mean, each in zip(whole, parameters, strict=True)),
        "taken_up": all(torch.equal(again.state[share][key], value) for key, value in optimizer.state[share].items()),
        "refreshed": inner.num_refreshed,
    }


def work(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {path: largest_difference(path, slice(rank * 4, rank * 4 + 4)) for path in SHARDED_OPTIMIZERS}
    told = {"differences": found, "halves": state_of_halves(rank)}
    Path(folder, f"found{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    torch.distributed.destroy_process_group()


def test_the_memory_of_a_divided_run_is_not_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**given: Any) -> str | None:
        options = replace(SdxlTrainOptions(), distributed=DistributedOptions(**given))
        return why_not(options)

    assert told() is None
    assert "DeepSpeed divides" in (told(deepspeed=True) or "")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "FSDP divides" in (told() or "")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found."""
    folder = tmp_path_factory.mktemp("found")
    started = [warm_processes().Process(target=work, args=(rank, str(folder))) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [json.loads((folder / f"found{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


def test_optimizers_take_the_same_steps_on_shares_and_go_on_from_saved_ones(found: list[dict[str, Any]]) -> None:
    differences = found[0]["differences"]
    assert {path: difference for path, difference in differences.items() if difference > 1e-6} == {}
    assert len(differences) == len(SHARDED_OPTIMIZERS)


def test_the_state_of_divided_parameters_is_saved_whole_by_one_process_and_taken_up_in_parts(found: list[dict[str, Any]]) -> None:
    assert [each["halves"] for each in found] == [
        {"kept": kept, "is_whole": True, "taken_up": True, "refreshed": 1} for kept in (True, False)
    ]
