"""A traced peak is the real one: the same step with fake tensors, and with real ones under torch's own record of its allocator."""

import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile

from library.memory.trace import ACTIVATIONS, GRADIENTS, OPTIMIZER, WEIGHTS, StorageCounter
from library.memory.traceable import KEPT_BY_BITSANDBYTES, kept_bytes, untraceable
from library.optim.optimizers import make_optimizer
from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from library.training.loop import one_step
from tools.bench_step import make_run
from tools.bench_trace import forecast, use_kernels_of

SMALL = BenchOptions(mode="finetune", size="tiny", resolution=128, batch_size=4)
SMALLER = BenchOptions(mode="finetune", size="tiny", resolution=32, batch_size=1)
BF16 = StepPrecisionOptions(mixed_precision="bf16", full_bf16=True)
ADAFACTOR = {
    "optimizer_type": "Adafactor",
    "optimizer_args": ("relative_step=False", "scale_parameter=False"),
    "max_grad_norm": 0,
}


@dataclass(frozen=True)
class Case:
    bench: BenchOptions
    precision: StepPrecisionOptions
    optimizer: OptimizerOptions
    device_type: str = "cpu"
    """Whose kernels torch's optimizers use; those of a GPU run on a CPU too."""


CASES = {
    "all gradients at once": Case(SMALL, StepPrecisionOptions(), OptimizerOptions(**ADAFACTOR)),
    "fused": Case(
        SMALL, StepPrecisionOptions(gradient_checkpointing=True), OptimizerOptions(**ADAFACTOR, fused_backward_pass=True)
    ),
    "LoRA": Case(SMALL.model_copy(update={"mode": "lora"}), StepPrecisionOptions(), OptimizerOptions()),
    "LoRA beside 8 bits": Case(SMALL.model_copy(update={"mode": "lora"}), StepPrecisionOptions(fp8_base=True), OptimizerOptions()),
    "LoRA beside 4 bits": Case(
        SMALL.model_copy(update={"mode": "lora"}), StepPrecisionOptions(base_quant="nf4"), OptimizerOptions()
    ),
    "RMSprop, foreach": Case(SMALLER, StepPrecisionOptions(), OptimizerOptions(optimizer_type="RMSprop"), "cuda"),
    "bf16 weights, AdamW": Case(SMALLER, BF16, OptimizerOptions(), "cuda"),
    "bf16 weights, AdamW8bit": Case(SMALLER, BF16, OptimizerOptions(use_8bit_adam=True)),
    "bf16 weights, fused": Case(SMALLER, BF16, OptimizerOptions(**ADAFACTOR, fused_backward_pass=True)),
    "bf16 weights, fused groups": Case(SMALLER, BF16, OptimizerOptions(**ADAFACTOR, fused_optimizer_groups=4)),
}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Let each test start accelerate in its own precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def measured_peak(case: Case) -> int:
    """Run real steps; what the allocator handed out and took back is summed from torch's profile.

    The profile begins before the model is made: it knows nothing of the beginning of what was there before it, so what earlier
    tests left in cycles of references has to be gone by then.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run, batch = make_run(case.bench, case.precision, case.optimizer)
        use_kernels_of(run.schedule.optimizer, case.device_type)
        for _ in range(2):
            one_step(run, batch)
    changes = sorted(
        (event.start_time_ns, event.extra_fields.alloc_size)
        for event in walk(recorded.profiler.kineto_results.experimental_event_tree())
        if event.tag == torch._C._profiler._EventType.Allocation
    )
    return max(itertools.accumulate(change for _, change in changes))


def walk(events):
    for event in events:
        yield event
        yield from walk(event.children)


@pytest.mark.parametrize("name", CASES)
def test_the_forecast_is_within_a_tenth_of_what_the_allocator_records(name: str) -> None:
    case = CASES[name]
    real, traced = measured_peak(case), forecast(*vars(case).values()).total
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


@pytest.mark.parametrize("path", KEPT_BY_BITSANDBYTES)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_computed_state_is_that_of_bitsandbytes(path: str) -> None:
    for count in (100, 4095, 4096, 10_000):
        parameter = torch.nn.Parameter(torch.zeros(count))
        name = path.rpartition(".")[2]
        arguments = ("momentum=0.9",) if name == "SGD8bit" else None
        optimizer = make_optimizer(OptimizerOptions(optimizer_type=path, optimizer_args=arguments), [{"params": [parameter]}])
        parameter.grad = torch.ones(count)
        optimizer.step()
        state = optimizer.state[parameter]
        tables = {"qmap1", "qmap2"}  # shared by all tensors of a device
        held = sum(value.nbytes for key, value in state.items() if isinstance(value, torch.Tensor) and key not in tables)
        assert held == kept_bytes(count, *KEPT_BY_BITSANDBYTES[path])


SPELLINGS = {
    "use_8bit_adam": OptimizerOptions(use_8bit_adam=True),
    "a bitsandbytes class": OptimizerOptions(optimizer_type="bitsandbytes.optim.AdEMAMix8bit"),
    "Adafactor with relative steps": OptimizerOptions(optimizer_type="Adafactor", max_grad_norm=0),
    **{name: OptimizerOptions(optimizer_type=name) for name in ("Lion", "AdamWScheduleFree", "RMSprop", "PagedAdamW32bit")},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_is_not_refused_can_be_forecast(name: str) -> None:
    per_element = {"use_8bit_adam": 2, "a bitsandbytes class": 3, "PagedAdamW32bit": 8, "AdamWScheduleFree": 8}
    per_element |= {"Lion": 4, "RMSprop": 4}
    assert untraceable(SPELLINGS[name]) is None
    parts = forecast(SMALLER, StepPrecisionOptions(), SPELLINGS[name]).parts
    if name in per_element:
        assert parts[OPTIMIZER] == pytest.approx(per_element[name] / 4 * parts[WEIGHTS], rel=0.05)
    else:
        assert 0 < parts[OPTIMIZER] < 0.5 * parts[WEIGHTS]


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam", "ASGD", "torch.optim.LBFGS", "bitsandbytes.optim.LAMB8bit", "o.Thing"])
def test_what_cannot_be_traced_is_said_in_a_sentence(name: str) -> None:
    assert f"The memory of {name} cannot be forecast" in (untraceable(OptimizerOptions(optimizer_type=name)) or "")
