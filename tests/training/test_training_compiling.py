"""Compiled blocks: what is compiled, when it runs, and what stays as it was."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from library.options.groups.distributed import ProcessGroupOptions
from library.options.groups.precision import WorkingPrecisionOptions
from library.training.accelerator import make_accelerator
from library.training.compiling import batch_of_each_shape


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu()


def test_every_size_of_bucket_and_batch_is_met_once() -> None:
    buckets = {0: (64, 64), 1: (64, 64), 2: (64, 64), 3: (96, 32), 4: (64, 64), 5: (64, 64)}
    batches = [(0, 1), (3,), (2,), (4, 5)]
    dataset = SimpleNamespace(
        plan=lambda epoch, processes: SimpleNamespace(
            batches=batches, share=lambda number, index, count: SimpleNamespace(uses=batches[number])
        ),
        item_of=lambda use: SimpleNamespace(section=0, geometry=SimpleNamespace(bucket=buckets[use])),
    )
    accelerator = SimpleNamespace(num_processes=1, process_index=0)
    assert batch_of_each_shape(SimpleNamespace(dataset=dataset, accelerator=accelerator)) == [(0, 1), (3,), (2,)]


def test_a_configuration_of_accelerate_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    accelerator = make_accelerator(WorkingPrecisionOptions(), ProcessGroupOptions())
    model = Block()
    assert accelerator.prepare(model) is model and model(torch.ones(1, 4)).shape == (1, 4)
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
