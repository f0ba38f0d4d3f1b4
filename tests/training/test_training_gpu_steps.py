"""Steps on a real GPU: nothing waits for it, and what moves between memories changes no result beyond what rounding does."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn

from library.optim.finite import FiniteGate
from library.optim.host_states import HostStates
from library.optim.optimizers import make_optimizer
from library.optim.parameter_steps import ParameterSteps
from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from library.training.loop import accumulate_gradient, update_parameters
from tools.bench_step import make_run

pytestmark = pytest.mark.gpu

WARM_UP, STEPS = 2, 3
"""Steps in which memory is taken, kernels are chosen and state is made, and steps after them in which nothing may wait."""
DEVICE = "cuda"
SGD = {"optimizer_type": "SGD", "optimizer_args": ("momentum=0.0",), "learning_rate": 1.0}
ADAFACTOR = {
    "optimizer_type": "Adafactor",
    "optimizer_args": ("relative_step=False", "scale_parameter=False"),
    "max_grad_norm": 0.0,
}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Let each test start accelerate in its own precision."""
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


@contextmanager
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Raise where the host waits for the device."""

    def waits(*arguments: object) -> None:
        raise AssertionError("torch.cuda.synchronize was called")

    torch.cuda.set_sync_debug_mode("error")
    try:
        with monkeypatch.context() as patch:
            patch.setattr("torch.cuda.synchronize", waits)
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def change(mode: Any, precision: Mapping[str, Any], optimizer: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return what some steps on one batch make of the trained weights, less what they were: float64 (n,), on the CPU."""
    torch.manual_seed(0)
    bench = BenchOptions(mode=mode, size="tiny", resolution=256, batch_size=2, network_dim=8)
    run, batch = make_run(bench, StepPrecisionOptions(**{"mixed_precision": "bf16", **precision}), OptimizerOptions(**optimizer))

    def step(number: int) -> Tensor:
        run.updater.begin(number)
        loss = accumulate_gradient(run, run.send(batch), epoch=1, index=number, window=1, synchronise=True)
        update_parameters(run)
        return loss

    def weights() -> Tensor:
        tensors = run.trainable.module.state_dict().values()
        return torch.cat([tensor.detach().double().cpu().flatten() for tensor in tensors])

    before = weights()
    losses = [step(number) for number in range(WARM_UP)]
    with nothing_waits(monkeypatch):
        losses += [step(number) for number in range(WARM_UP, WARM_UP + STEPS)]
    assert torch.stack(losses).isfinite().all()
    return weights() - before


def differ(one: Tensor, other: Tensor) -> float:
    """Return the size of a difference in units of the first."""
    return float((one - other).norm() / one.norm())


CHECKPOINTED = {"gradient_checkpointing": True}
NF4 = {"base_quant": "nf4"}
LORA: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], float]] = {
    "checkpointing": ({}, CHECKPOINTED, 0.1),
    "activations in main memory": ({}, CHECKPOINTED | {"cpu_offload_checkpointing": True}, 0.1),
    "swapped blocks": ({}, {"blocks_to_swap": 8}, 0.1),
    "swapped blocks and activations": ({}, CHECKPOINTED | {"blocks_to_swap": 8, "cpu_offload_checkpointing": True}, 0.1),
    "nf4, swapped blocks": (NF4, NF4 | {"blocks_to_swap": 8}, 0.1),
    "bf16 adapters": ({}, {"full_bf16": True}, 0.3),
    "int8": ({}, {"base_quant": "int8"}, 0.2),
    "fp8": ({}, {"base_quant": "fp8"}, 0.5),
    "nf4": ({}, NF4, 1.0),
}
"""Two settings, and by how much what they learn may differ; on a CPU 0 for the first five, then 0.13, 0.06, 0.26, 0.79."""


@pytest.mark.parametrize("name", LORA)
def test_adapters_learn_the_same_wherever_the_rest_lies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, tolerance = LORA[name]
    assert differ(change("lora", one, SGD, monkeypatch), change("lora", other, SGD, monkeypatch)) < tolerance


FUSED = SGD | {"fused_backward_pass": True, "max_grad_norm": 0.0}
SWAPPED = CHECKPOINTED | {"blocks_to_swap": 8}


@pytest.mark.parametrize("name", ["SGDNesterov", "SGDNesterov8bit"])
@pytest.mark.parametrize("weights", [{}, {"full_bf16": True}], ids=["float32", "bf16"])
def test_a_whole_model_learns_the_same_with_its_blocks_in_main_memory(
    weights: Mapping[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = FUSED | {"optimizer_type": name, "learning_rate": 0.05, "optimizer_args": ("momentum=0.9",)}
    plain = change("finetune", weights, optimizer, monkeypatch)
    assert differ(plain, change("finetune", weights | SWAPPED, optimizer, monkeypatch)) < 0.3


@pytest.mark.parametrize(
    "optimizer",
    [
        {"optimizer_type": "AdamW"},
        {"optimizer_type": "AdamW", "optimizer_states": "host"},
        {"optimizer_type": "AdamW8bit"},
        {"optimizer_type": "AdamW8bit", "optimizer_states": "host"},
        {"optimizer_type": "AdamW", "fused_backward_pass": True},
        ADAFACTOR,
        ADAFACTOR | {"fused_backward_pass": True},
        {"optimizer_type": "Lion"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
@pytest.mark.parametrize("mode", ["lora", "finetune"])
def test_steps_of_optimizers_wait_for_nothing(mode: str, optimizer: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    changed = change(mode, {"full_bf16": mode == "finetune"}, optimizer, monkeypatch)
    assert changed.isfinite().all() and changed.any()


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_state_in_main_memory_makes_the_same_steps_to_the_bit(name: str) -> None:
    stepped = []
    for on_host in (False, True):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(512, 512, device=DEVICE)) for _ in range(4)]
        optimizer = make_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=1e-2), [{"params": weights}])
        if on_host:
            HostStates(optimizer)
        steps = ParameterSteps(optimizer)
        for seed in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
                steps.step([weight], seed)
        stepped.append(torch.stack([weight.detach() for weight in weights]))
    assert torch.equal(*stepped)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_a_gradient_that_is_not_finite_leaves_the_weights_without_anybody_waiting(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = nn.Parameter(torch.ones(128, 128, device=DEVICE))
    arguments = ("weight_decay=0.0",)
    optimizer = make_optimizer(OptimizerOptions(optimizer_type=name, optimizer_args=arguments), [{"params": [weight]}])
    gate = FiniteGate(optimizer, stays_shut=False)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()  # makes the state
    for value in (float("nan"), float("inf")):
        weight.grad = torch.full_like(weight, value)
        with nothing_waits(monkeypatch):
            if gate.admits([weight]):
                optimizer.step()
        assert not gate.is_open() and torch.equal(weight.detach(), torch.ones_like(weight))
        gate.take()
    weight.grad = torch.ones_like(weight)
    assert gate.admits([weight])
    optimizer.step()
    assert float(weight.detach().max()) < 1
