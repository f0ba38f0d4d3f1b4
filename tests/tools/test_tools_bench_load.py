"""The measurement of loading, in processes of its own: one that ran other tests has memory to reuse."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from library.files.tensors import open_tensors

ROOT = Path(__file__).resolve().parents[2]

FREED_AGAIN = """
import torch
from tools.bench_load import _with_peak
_, without = _with_peak(list)
_, peak = _with_peak(lambda: [int(torch.ones(50_000_000, dtype=torch.uint8)[::4096].sum())])
print(peak - without)
"""


def output_of(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_reports_the_size_of_the_weights_and_the_peak_beside_it(tiny_checkpoint: Path) -> None:
    told = json.loads(output_of("tools/bench_load.py", str(tiny_checkpoint), "--dtype", "fp32"))
    elements = sum(torch.Size(info.shape).numel() for info in open_tensors(tiny_checkpoint).infos.values()) - 1  # logit_scale
    assert told["weight_bytes"] == 4 * elements
    assert told["peak_over_weights"] > 0.9
    assert told["seconds"] > 0


def test_memory_that_is_freed_again_counts_in_the_peak() -> None:
    assert int(output_of("-c", FREED_AGAIN)) > 30_000_000
