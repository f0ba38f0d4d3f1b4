"""How many operations a training step hands to the device, each at least one kernel: counted on fake tensors, on any machine.

A device that computes faster than a host can ask is bound by this number. The step is the benchmark's own, at its real size.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from library.training.loop import accumulate_gradient, update_parameters
from tools.bench_trace import traced_run

_aten = torch.ops.aten
_FREE = {_aten.detach, _aten.alias, _aten._unsafe_view, _aten.lift_fresh} | {
    getattr(_aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}
"""What only makes a tensor and computes nothing, beside views."""
MOST_TOLD = 5


class OperationCounter(TorchDispatchMode):
    """Counts, by name, the operations below autograd that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        if func.namespace not in ("prim", "profiler") and not func.is_view and func.overloadpacket not in _FREE:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Operations:
    """What a step is made of."""

    step: int
    """Operations of the forward and the backward pass."""
    update: int
    """Operations of limiting the gradients and of the optimizer's step, where they follow the backward pass."""
    most_frequent: dict[str, int]
    """Those of `step` by name, the most frequent first."""


def count_operations(bench: BenchOptions, precision: StepPrecisionOptions, optimizer: OptimizerOptions) -> Operations:
    """Count the operations of one batch and one update; see `tools.bench_trace.traced_run`."""
    with traced_run(bench, precision, optimizer) as (run, batch):
        with OperationCounter() as step:
            accumulate_gradient(run, run.send(batch), epoch=1, index=0, window=1, synchronise=True)
        with OperationCounter() as update:
            update_parameters(run)
    return Operations(step.counts.total(), update.counts.total(), dict(step.counts.most_common()))


def rows(operations: Operations) -> dict[str, str]:
    """Return the counts for people: one fact per line."""
    frequent = ", ".join(f"{count:,} {name}" for name, count in list(operations.most_frequent.items())[:MOST_TOLD])
    return {
        "operations": f"{operations.step:,} in forward and backward pass, {operations.update:,} in the update; counted",
        "most frequent": frequent,
    }
