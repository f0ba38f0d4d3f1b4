"""Measure one training step with random weights, without any file: speed, share of the device's peak, memory.

    python tools/bench.py --mixed_precision bf16 --json lora.json
    python tools/bench.py --mode finetune --mixed_precision bf16 --gradient_checkpointing --batch_size 4
    python tools/bench.py --mode finetune --mixed_precision bf16 --full_bf16 --gradient_checkpointing --fused_backward_pass \\
        --optimizer_type Adafactor --optimizer_args relative_step=False scale_parameter=False --max_grad_norm 0 --trace
    python tools/bench.py --size tiny --resolution 256 --steps 3        # seconds, on any CPU

With `--trace` nothing is measured: the peak memory is forecast by tracing the step with fake tensors, on any machine. On a GPU the
forecast stands beside the measurement. With `--count_operations` the operations of the step are counted in the same way.

The step is the training loop's own, with cached latents and cached text. Options that training has are spelled as there.
"""

import json
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the project's folder is not on the path

from library.files.atomic import atomic_write_text
from library.memory.traceable import untraceable
from library.options.checks import checkpoint_problems, precision_problems, quant_problems
from library.options.checks_compile import compile_problems
from library.options.checks_optimizer import fused_problems, host_state_problems, optimizer_name, optimizer_problems
from library.options.checks_swap import swap_problems, trained_swap_problems
from library.options.checks_trained import packed_problems
from library.options.entry import run_script
from library.options.errors import UsageError
from library.options.groups.bench import BenchOptions
from library.options.groups.compile import CompileOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from library.options.parse import parse
from library.options.scripts import ScriptOptions
from library.training.environment import hardware as hardware_of
from library.training.environment import installed_versions

if TYPE_CHECKING:
    from library.memory.trace import Peak
    from tools.bench_operations import Operations
    from tools.bench_step import Speed

UNEVEN = 1.5
"""A slowest step this many times as long as the fastest means that the device was probably not ours alone."""

SIZE_STEP = 32
"""Image sides are multiples of this many pixels: 8 for the VAE, times 4 for the two downsamplings of the U-Net."""


@dataclass(frozen=True)
class BenchScriptOptions(ScriptOptions):
    """Options of `tools/bench.py`."""

    script: ClassVar[str] = "tools/bench.py"
    purpose: ClassVar[str] = "Measure one training step with random weights, without any file."

    bench: BenchOptions = field(default_factory=BenchOptions)
    precision: StepPrecisionOptions = field(default_factory=StepPrecisionOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    compile: CompileOptions = field(default_factory=CompileOptions)


def check(options: BenchScriptOptions) -> None:
    """Refuse what a field's own range does not.

    Raises:
        UsageError: naming the option and what is allowed.
    """
    resolution = options.bench.resolution
    if resolution % SIZE_STEP:
        below = resolution // SIZE_STEP * SIZE_STEP
        near = f"the nearest are {below} and {below + SIZE_STEP}"
        raise UsageError([f"--resolution {resolution}: must be a multiple of {SIZE_STEP}; {near}."])
    problems = optimizer_problems(options.optimizer)
    problems += precision_problems(options.precision)
    problems += checkpoint_problems(options.precision)
    problems += swap_problems(options.precision)
    problems += compile_problems(options.compile)
    problems += idle_compile_problems(options)
    if options.bench.mode == "finetune":
        problems += [*packed_problems(options.precision), *trained_swap_problems(options.precision, options.optimizer)]
    problems += quant_problems(options.precision)
    problems += fused_problems(options.optimizer, 1, options.precision.mixed_precision)
    problems += host_state_problems(options.optimizer, options.precision.mixed_precision, is_divided=False)
    if options.bench.trace and not problems and (problem := untraceable(options.optimizer)):
        problems.append(problem)
    if options.bench.count_operations and not problems and untraceable(options.optimizer):
        name = optimizer_name(options.optimizer)
        problems.append(f"--count_operations cannot step {name}, which wants real values. Count with another, such as AdamW.")
    if problems:
        raise UsageError(problems)


def idle_compile_problems(options: BenchScriptOptions) -> Iterator[str]:
    """Yield what has no effect of the options about compiling."""
    if options.compile.torch_compile and (options.bench.trace or options.bench.count_operations):
        yield "--torch_compile has no effect on what is traced or counted: that is the step as it is. Measure it."
    if options.compile.dynamo_backend != "inductor" and not options.compile.torch_compile:
        yield "--dynamo_backend has no effect without --torch_compile."


def report(
    options: BenchScriptOptions,
    argv: Sequence[str],
    hardware: dict[str, Any],
    speed: "Speed | None",
    peak: "Peak | None",
    operations: "Operations | None",
) -> dict[str, Any]:
    """Return everything needed to judge and repeat the measurement, as JSON takes it.

    Args:
        options: of the run.
        argv: as typed.
        hardware: the machine.
        speed: what was measured, or None.
        peak: what was forecast, or None.
        operations: what was counted, or None.
    """
    groups = ("bench", "precision", "optimizer", "compile")
    return {
        "command": shlex.join(["python", "tools/bench.py", *argv]),
        "options": {name: getattr(options, name).model_dump(mode="json") for name in groups},
        **({"result": asdict(speed)} if speed else {}),
        **({"traced_peak_gib": peak.in_gib()} if peak else {}),
        **({"operations": asdict(operations)} if operations else {}),
        "hardware": hardware,
        "versions": installed_versions(),
    }


def what_is_run(options: BenchScriptOptions, hardware: dict[str, Any]) -> dict[str, str]:
    """Say what step this is, for people."""
    bench, precision = options.bench, options.precision
    what = f"LoRA of rank {bench.network_dim}" if bench.mode == "lora" else "full fine-tune"
    kinds = {
        "full_bf16": "bf16 weights",
        "full_fp16": "fp16 weights",
        "gradient_checkpointing": "gradient checkpointing",
        "cpu_offload_checkpointing": "activations in main memory",
    }
    flags = [text for name, text in kinds.items() if getattr(precision, name)]
    flags += [f"in {precision.checkpoint_fraction:g} of the blocks"] if precision.checkpoint_fraction != 1 else []
    if precision.swaps_blocks:
        share = precision.offload_fraction
        flags.append(f"{precision.blocks_to_swap} blocks in main memory" if share is None else f"{share:.0%} of it in main memory")
    flags += [f"frozen weights in {precision.denoiser_quant}"] if precision.denoiser_quant else []
    flags += ["optimizer state in main memory"] if options.optimizer.optimizer_states == "host" else []
    flags += ["fused backward pass"] if options.optimizer.fused_backward_pass else []
    groups = options.optimizer.fused_optimizer_groups
    flags += [f"{groups} fused groups"] if groups else []
    flags += [f"compiled by {options.compile.dynamo_backend}"] if options.compile.torch_compile else []
    size = f"{bench.batch_size} × {bench.resolution}²"
    return {
        "step": ", ".join(
            [f"{what}, {bench.size} U-Net, {size}, {precision.mixed_precision}", optimizer_name(options.optimizer), *flags]
        ),
        "device": f"{hardware['name']} ({hardware['device']}, {hardware['threads']} threads)",
    }


def measured(speed: "Speed") -> dict[str, str]:
    """Return the measurement for people: one fact per line."""
    memory = ", ".join(f"{size:.2f} GiB {kind}" for kind, size in speed.peak_memory_gib.items())
    steps = speed.step_seconds
    is_uneven = steps["slowest"] > UNEVEN * steps["fastest"]
    busy = " (uneven: the device was probably not ours alone; measure again)" if is_uneven else ""
    kernels = {"kernels": device_work(speed)} if speed.kernels is not None else {}
    return kernels | {
        "trained": f"{speed.trained_parameters:,} parameters",
        "time": f"{speed.seconds_per_step:.4f} s/step, {speed.images_per_second:.3f} images/s",
        "single steps": f"median {steps['median']:.4f} s, fastest {steps['fastest']:.4f} s, slowest {steps['slowest']:.4f} s{busy}",
        "arithmetic": f"{speed.tera_flop_per_second:.3f} TFLOP/s ({speed.tera_flop_per_step:.4f} TFLOP a step, counted)",
        "share of peak": f"{speed.share_of_matmul_peak:.1%} of {speed.matmul_peak_tera_flop_per_second:.3f} TFLOP/s, measured",
        "peak memory": memory,
        "host waits": ", ".join(f"{count} at {place}" for place, count in speed.host_waits.items()) or "none",
    }


def device_work(speed: "Speed") -> str:
    """Say how many kernels a step is, for how much of its time they run, and which take longest."""
    if speed.kernels is None:
        return ""
    most = ", ".join(f"{seconds:.4f} s {name[:60]}" for name, seconds in list(speed.kernels.longest.items())[:3])
    busy = speed.kernels.busy_seconds / speed.seconds_per_step
    return f"{speed.kernels.number:,} a step, at work for {busy:.0%} of its time; the longest: {most}"


def main(argv: Sequence[str]) -> None:
    """Check the options, measure, print the table, and write the JSON where asked."""
    options = parse(BenchScriptOptions, argv)
    check(options)

    import torch

    from tools import bench_operations, bench_step, bench_trace

    logging.captureWarnings(True)
    asked = (options.bench, options.precision, options.optimizer)
    has_gpu = torch.cuda.is_available()
    hardware = hardware_of(torch.device("cuda" if has_gpu else "cpu"))
    can_forecast = untraceable(options.optimizer) is None
    peak = bench_trace.forecast(*asked) if options.bench.trace or (has_gpu and can_forecast) else None
    operations = bench_operations.count_operations(*asked) if options.bench.count_operations else None
    speed = None if options.bench.trace or options.bench.count_operations else bench_step.measure(*asked, options.compile)
    facts = what_is_run(options, hardware) | (measured(speed) if speed else {}) | (bench_trace.rows(peak) if peak else {})
    facts |= bench_operations.rows(operations) if operations else {}
    print("\n".join(f"{name:<14} {value}" for name, value in facts.items()))
    if options.bench.json_file:
        atomic_write_text(
            options.bench.json_file, json.dumps(report(options, argv, hardware, speed, peak, operations), indent=2) + "\n"
        )


if __name__ == "__main__":
    run_script(main)
