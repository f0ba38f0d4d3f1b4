"""A traced peak is the real one: the same step with fake tensors, and with real ones under torch's own record of its allocator."""

from dataclasses import dataclass

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from library.memory.trace import ACTIVATIONS, GRADIENTS, OPTIMIZER, WEIGHTS, StorageCounter
from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import WorkingPrecisionOptions
from tools.bench_step import make_run, one_step
from tools.bench_trace import eight_bit_state, forecast

SMALL = BenchOptions(mode="finetune", size="tiny", resolution=128, batch_size=4)
ADAFACTOR = {
    "optimizer_type": "Adafactor",
    "optimizer_args": ("relative_step=False", "scale_parameter=False"),
    "max_grad_norm": 0,
}


@dataclass(frozen=True)
class Case:
    bench: BenchOptions
    precision: WorkingPrecisionOptions
    optimizer: OptimizerOptions


CASES = {
    "all gradients at once": Case(SMALL, WorkingPrecisionOptions(), OptimizerOptions(**ADAFACTOR)),
    "fused": Case(
        SMALL, WorkingPrecisionOptions(gradient_checkpointing=True), OptimizerOptions(**ADAFACTOR, fused_backward_pass=True)
    ),
    "LoRA": Case(SMALL.model_copy(update={"mode": "lora"}), WorkingPrecisionOptions(), OptimizerOptions()),
}


def measured_peak(case: Case) -> int:
    """Run real steps; what the allocator handed out and took back is summed from torch's profile of the second one."""
    run, batch = make_run(case.bench, case.precision, case.optimizer)
    one_step(run, batch)
    optimizer = run.schedule.optimizer
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    modules = {id(p): p for p in (*run.trainable.module.parameters(), *run.step.parts.denoiser.parameters())}
    resident = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*modules.values(), *state)}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        one_step(run, batch)
    changes = sorted(
        (event.start_time_ns, event.extra_fields.alloc_size)
        for event in walk(recorded.profiler.kineto_results.experimental_event_tree())
        if event.tag == torch._C._profiler._EventType.Allocation
    )
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return resident + peak


def walk(events):
    for event in events:
        yield event
        yield from walk(event.children)


@pytest.mark.parametrize("name", CASES)
def test_the_forecast_is_within_a_tenth_of_what_the_allocator_records(name: str) -> None:
    case = CASES[name]
    real, traced = measured_peak(case), forecast(case.bench, case.precision, case.optimizer).total
    assert abs(traced - real) < 0.1 * real, (traced, real)


def test_a_fused_backward_pass_holds_one_gradient_at_a_time() -> None:
    plain = forecast(*vars(CASES["all gradients at once"]).values())
    fused = forecast(*vars(CASES["fused"]).values())
    assert plain.parts[GRADIENTS] > 0.9 * plain.parts[WEIGHTS]
    assert 0 < fused.parts[GRADIENTS] < 0.1 * fused.parts[WEIGHTS]


def test_storages_are_counted_once_and_forgotten_when_they_are_gone() -> None:
    counter = StorageCounter(torch.device("cpu"))
    weight = torch.zeros(1024)
    counter.register([weight, weight.view(32, 32)], WEIGHTS)
    with counter:
        first = torch.ones(2048)
        view = first[:10]
        del first, view
        second = torch.ones(512)
        moved = second.to(torch.float64)
    assert counter.peak.parts == {WEIGHTS: 4096, GRADIENTS: 0, OPTIMIZER: 0, ACTIVATIONS: 8192}
    assert counter.peak.total == 12288 and moved.dtype == torch.float64


def test_the_state_of_8_bit_optimizers_is_that_of_bitsandbytes() -> None:
    import bitsandbytes

    for count in (100, 4095, 4096, 10_000):
        parameter = torch.nn.Parameter(torch.zeros(count))
        optimizer = bitsandbytes.optim.AdamW8bit([parameter])
        parameter.grad = torch.ones(count)
        optimizer.step()
        state = optimizer.state[parameter]
        tables = {"qmap1", "qmap2"}  # shared by all tensors of a device
        held = sum(value.nbytes for key, value in state.items() if isinstance(value, torch.Tensor) and key not in tables)
        assert held == eight_bit_state(count, 2)
