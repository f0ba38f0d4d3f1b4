"""Measure one training step with random weights, without any file: speed, share of the device's peak, memory.

    python tools/bench.py --mixed_precision bf16 --json lora.json
    python tools/bench.py --mode finetune --mixed_precision bf16 --gradient_checkpointing --batch_size 4
    python tools/bench.py --size tiny --resolution 256 --steps 3        # seconds, on any CPU

The step is the training loop's own, with cached latents and cached text. Options that training has are spelled as there.
"""

import json
import logging
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the project's folder is not on the path

from library.files.atomic import atomic_write_text
from library.options.entry import run_script
from library.options.errors import UsageError
from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import WorkingPrecisionOptions
from library.options.parse import parse
from library.options.scripts import ScriptOptions

if TYPE_CHECKING:
    from tools.bench_step import Speed

PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "bitsandbytes", "xformers")
"""Packages whose version can change the numbers."""

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
    precision: WorkingPrecisionOptions = field(default_factory=WorkingPrecisionOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)


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


def report(options: BenchScriptOptions, argv: Sequence[str], speed: "Speed", hardware: dict[str, Any]) -> dict[str, Any]:
    """Return everything needed to judge and repeat the measurement, as JSON takes it."""
    return {
        "command": shlex.join(["python", "tools/bench.py", *argv]),
        "options": {name: getattr(options, name).model_dump(mode="json") for name in ("bench", "precision", "optimizer")},
        "result": asdict(speed),
        "hardware": hardware,
        "versions": {"python": platform.python_version()} | installed_versions(),
    }


def installed_versions() -> dict[str, str]:
    """The versions of the packages that matter, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(options: BenchScriptOptions, speed: "Speed", hardware: dict[str, Any]) -> str:
    """Return the result for people: one fact per line."""
    bench, precision = options.bench, options.precision
    what = f"LoRA of rank {bench.network_dim}" if bench.mode == "lora" else "full fine-tune"
    checkpointing = ", gradient checkpointing" if precision.gradient_checkpointing else ""
    memory = ", ".join(f"{size:.2f} GiB {kind}" for kind, size in speed.peak_memory_gib.items())
    steps = speed.step_seconds
    is_uneven = steps["slowest"] > UNEVEN * steps["fastest"]
    busy = " (uneven: the device was probably not ours alone; measure again)" if is_uneven else ""
    rows = {
        "step": f"{what}, {bench.size} U-Net, {bench.batch_size} × {bench.resolution}², {precision.mixed_precision}{checkpointing}",
        "device": f"{hardware['name']} ({hardware['device']}, {hardware['threads']} threads)",
        "trained": f"{speed.trained_parameters:,} parameters",
        "time": f"{speed.seconds_per_step:.4f} s/step, {speed.images_per_second:.3f} images/s",
        "single steps": f"median {steps['median']:.4f} s, fastest {steps['fastest']:.4f} s, slowest {steps['slowest']:.4f} s{busy}",
        "arithmetic": f"{speed.tera_flop_per_second:.3f} TFLOP/s ({speed.tera_flop_per_step:.4f} TFLOP a step, counted)",
        "share of peak": f"{speed.share_of_matmul_peak:.1%} of {speed.matmul_peak_tera_flop_per_second:.3f} TFLOP/s, measured",
        "peak memory": memory,
    }
    return "\n".join(f"{name:<14} {value}" for name, value in rows.items())


def main(argv: Sequence[str]) -> None:
    """Check the options, measure, print the table, and write the JSON where asked."""
    options = parse(BenchScriptOptions, argv)
    check(options)

    import torch

    from tools import bench_step

    logging.captureWarnings(True)
    speed = bench_step.measure(options.bench, options.precision, options.optimizer)
    hardware = bench_step.hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(table(options, speed, hardware))
    if options.bench.json_file:
        atomic_write_text(options.bench.json_file, json.dumps(report(options, argv, speed, hardware), indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
