"""Measure what loading an SDXL model costs: seconds, and peak memory beside the size of the finished weights.

    python tools/make_tiny_sdxl.py full.safetensors --full
    python tools/bench_load.py full.safetensors --dtype bf16

All parts are loaded as a training run does, onto the CPU, and kept. Memory is the process's anonymous memory (RssAnon), sampled
every few milliseconds: pages of the memory-mapped file are left out, since the system takes them back whenever it needs them.
Linux only.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_SAMPLE_SECONDS = 0.002


def main(argv: Sequence[str]) -> None:
    """Load the model that the command line names and print one line of JSON.

    Raises:
        UserError: the model cannot be opened.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint file or a diffusers folder")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="what the weights are loaded as (bf16)")
    parser.add_argument("--disable_mmap", action="store_true", help="read files instead of mapping them into memory")
    arguments = parser.parse_args(argv)
    sys.stdout.write(json.dumps(measure(arguments.model, _DTYPES[arguments.dtype], not arguments.disable_mmap)) + "\n")


def measure(model: str, dtype_name: str, mmap: bool = True) -> dict[str, Any]:
    """Load all parts of a model and return seconds, bytes of the weights, peak bytes while loading, and their ratio.

    Args:
        model: a checkpoint file or a diffusers folder.
        dtype_name: a floating-point dtype by torch's name.
        mmap: map safetensors files into memory.
    """
    import torch

    from library.models.family import ModelSource
    from library.models.sdxl.family import SdxlFamily

    dtype, cpu = getattr(torch, dtype_name), torch.device("cpu")
    before, start = _anonymous_bytes(), time.perf_counter()

    def load() -> list[torch.nn.Module]:
        family = SdxlFamily.open(ModelSource(model, mmap=mmap))
        encoders = family.load_text_encoders(dtype, cpu)
        return [*encoders, family.load_vae(dtype, cpu), family.load_denoiser(dtype, cpu)]

    modules, peak = _with_peak(load)
    seconds = time.perf_counter() - start
    weights = sum(parameter.numel() * parameter.itemsize for module in modules for parameter in module.parameters())
    return {
        "model": model,
        "dtype": dtype_name,
        "mmap": mmap,
        "seconds": round(seconds, 2),
        "weight_bytes": weights,
        "peak_bytes": peak - before,
        "peak_over_weights": round((peak - before) / weights, 3),
    }


def _with_peak(work: Callable[[], list[Any]]) -> tuple[list[Any], int]:
    """Run `work` and return its result and the peak of anonymous memory meanwhile, in bytes."""
    peak, done = _anonymous_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLE_SECONDS):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return result, max(peak, _anonymous_bytes())


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this needs Linux 4.5 or later")


if __name__ == "__main__":
    from library.options.entry import run_script

    run_script(main)
