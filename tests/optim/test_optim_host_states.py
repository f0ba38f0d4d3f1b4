"""An optimizer's state in main memory: the same steps to the bit, with one part of it on the device at a time."""

import logging
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.memory.trace import OPTIMIZER
from library.optim.host_states import HostStates
from library.optim.optimizers import make_optimizer
from library.optim.parameter_steps import ParameterSteps, load_optimizer_state
from library.optim.updates import make_updater
from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from tools.bench_trace import forecast

LARGE = 1024
"""Bytes from which on tensors of these tests go to main memory."""


class Run:
    """Three parameters, of which the last has state too small to go, and steps with gradients that a seed decides."""

    def __init__(self, name: str, dtype: torch.dtype, on_host: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        shapes = (80, 80), (64, 100), (4,)
        self.parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
        options = OptimizerOptions(optimizer_type=name, learning_rate=1e-2)
        self.optimizer = make_optimizer(options, [{"params": self.parameters}])
        self.host = HostStates(self.optimizer, smallest=LARGE) if on_host else None
        self.steps = ParameterSteps(self.optimizer)

    def step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for parameter in self.parameters:
            self.steps.step([parameter], seed)

    def large_state(self) -> dict[tuple[int, str], torch.Tensor]:
        states = enumerate(self.optimizer.state[parameter] for parameter in self.parameters)
        return {
            (number, key): value
            for number, state in states
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and value.nbytes >= LARGE
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion"])
def test_steps_saving_and_loading_are_those_of_state_on_the_device_to_the_bit(name: str, dtype: torch.dtype) -> None:
    plain, ours = Run(name, dtype, on_host=False), Run(name, dtype, on_host=True)
    for seed in range(2):
        plain.step(seed)
        ours.step(seed)
    homes = {place: value.data_ptr() for place, value in ours.large_state().items()}
    assert homes and {number for number, _ in homes} == {0, 1}
    met: list[int] = []
    ours.optimizer.register_step_pre_hook(lambda *_: met.extend(value.data_ptr() for value in ours.large_state().values()))
    resumed = Run(name, dtype, on_host=True)
    loads: list[Any] = []
    load = resumed.optimizer.load_state_dict
    resumed.optimizer.load_state_dict = lambda saved: loads.append(saved["state"]) or load(saved)
    for parameter, saved in zip(resumed.parameters, ours.parameters, strict=True):
        parameter.data.copy_(saved.data)
    load_optimizer_state(resumed.optimizer, deepcopy(ours.optimizer.state_dict()))
    for run in (plain, ours, resumed):
        run.step(2)
    assert {place: value.data_ptr() for place, value in ours.large_state().items()} == homes, "each tensor has one place"
    in_first_step = met[: len(homes)]
    assert 0 < len(set(in_first_step) - set(homes.values())) < len(homes), "the state of one parameter at a time came"
    loaded = [value for state in loads[0].values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert loads[0].keys() == {0, 1, 2} and all(value.nbytes < LARGE for value in loaded), "nothing large was loaded to the device"
    for run in (ours, resumed):
        assert all(torch.equal(*pair) for pair in zip(run.parameters, plain.parameters, strict=True))
        assert all(torch.equal(value, plain.large_state()[place]) for place, value in run.large_state().items())


def test_a_step_that_fails_leaves_no_state_on_the_device() -> None:
    run = Run("AdamW", torch.float32, on_host=True)
    run.step(0)
    homes = {place: value.data_ptr() for place, value in run.large_state().items()}
    met: list[int] = []

    def fail(*_: object) -> None:
        met.extend(value.data_ptr() for value in run.large_state().values())
        raise MemoryError

    run.optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        run.step(1)
    assert set(met) != set(homes.values()), "it was brought before"
    assert {place: value.data_ptr() for place, value in run.large_state().items()} == homes


@pytest.mark.parametrize("more", [{}, {"optimizer_type": "AdamW8bit"}, {"fused_backward_pass": True, "max_grad_norm": 0}])
def test_the_forecast_has_no_state_on_the_device(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.optim.updates._CHUNK", 2**18)  # the whole of this model would be one chunk
    bench = BenchOptions(mode="finetune", size="tiny", resolution=32, batch_size=1)
    there, here = (
        forecast(bench, StepPrecisionOptions(), OptimizerOptions(optimizer_states=where, **more)) for where in ("device", "host")
    )
    # What is left is one tensor for each that is too small to go, and the counts of steps.
    assert here.parts[OPTIMIZER] < 0.12 * there.parts[OPTIMIZER]
    assert here.total < there.total - 0.5 * there.parts[OPTIMIZER]


def test_where_training_runs_in_main_memory_it_is_said_that_nothing_changes(caplog: pytest.LogCaptureFixture) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    options = OptimizerOptions(optimizer_states="host")
    optimizer = make_optimizer(options, [{"params": [parameter]}])
    accelerator = SimpleNamespace(num_processes=1, scaler=None, device=torch.device("cpu"))
    with caplog.at_level(logging.INFO):
        make_updater(optimizer, optimizer, [parameter], options, accelerator)
    assert "so the optimizer's state is there already" in caplog.text
    assert HostStates.of(optimizer) is None
