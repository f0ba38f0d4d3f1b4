"""What networks tell of their norms, ours and those of other packages."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.training.trainable import NetworkTrainable
from tests.training.fake_run import FakeRun, Recorder, dataset


class Foreign(nn.Module):
    """A network that keeps account of norms, as sd-scripts asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def update_grad_norms(self) -> None:
        self.told.append("gradients")

    def update_norms(self) -> None:
        self.told.append("weights")

    def weight_norms(self) -> Tensor:
        return torch.tensor([1.0, 3.0])

    def grad_norms(self) -> None:
        return None

    def combined_weight_norms(self) -> Tensor:
        return torch.tensor([4.0, 6.0])


def trainable(network: Any, max_norm: float | None = None) -> NetworkTrainable:
    return NetworkTrainable(network, nn.Identity(), [], max_norm)


def test_norms_that_a_network_keeps_are_told_by_the_names_of_sd_scripts() -> None:
    own = trainable(Foreign())
    own.before_step()
    own.after_update()
    assert {name: float(norm) for name, norm in own.norms.items()} == {"norm/avg_key_norm": 2.0, "norm/avg_combined_norm": 5.0}
    assert own.network.told == ["gradients", "weights"]


def test_a_network_without_any_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    plain = trainable(nn.Linear(2, 2), max_norm=1.0)
    plain.before_step()
    plain.after_update()
    assert plain.norms == {}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "--scale_weight_norms has no effect" in record.getMessage()


def test_the_loop_tells_a_network_before_every_update() -> None:
    seen: list[int] = []
    run = FakeRun(dataset(4), updates=2, accumulation=2, observers=[Recorder()])
    run.run.updater.before_step = lambda: seen.append(1)
    run.train()
    assert len(seen) == 2
    told = FakeRun(dataset(2), updates=1)
    assert told.run.updater.before_step == told.trainable.before_step
