"""The state of optimizers that cannot be traced, counted from small tensors, is what they really keep."""

import logging

import pytest
import torch
from torch import nn

from library.optim.optimizers import make_optimizer
from library.options.groups.optimizer import OptimizerOptions
from library.training.stand_ins import computed_state
from library.training.stepped_state import stepped_bytes

SHAPES = ((640,), (320, 640), (1280, 320), (160, 96, 3, 3), (32, 7))
NAMES = (
    "Prodigy", "DAdaptAdam", "DAdaptLion", "DAdaptAdan", "DAdaptation", "prodigyplus.ProdigyPlusScheduleFree", "CAME", "AdEMAMix",
    "ASGD", "Muon", "pytorch_optimizer.SOAP", "bitsandbytes.optim.Adagrad8bit",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_counted_is_what_is_kept(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    options = OptimizerOptions(optimizer_type=name, learning_rate=1.0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES for _ in range(2)]
    optimizer = make_optimizer(options, [{"params": parameters}])
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    real = 0
    for state in optimizer.state.values():
        for key, value in state.items():
            parts = value if isinstance(value, list | tuple) else [value]
            real += sum(part.nbytes for part in parts if isinstance(part, torch.Tensor) and part.numel() > 1 and "qmap" not in key)
    without_values = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES for _ in range(2)]
    state_before = torch.get_rng_state()
    assert stepped_bytes(options, without_values) == pytest.approx(real, rel=0.05)
    assert torch.equal(torch.get_rng_state(), state_before)
    assert computed_state(options, without_values) > 0
