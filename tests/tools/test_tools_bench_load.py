"""The measurement of loading."""

import json

import torch

from library.files.tensors import open_tensors
from tools.bench_load import _with_peak, main


def test_it_reports_the_size_of_the_weights_and_the_peak_beside_it(tiny_checkpoint, capsys) -> None:
    main([str(tiny_checkpoint), "--dtype", "fp32"])
    told = json.loads(capsys.readouterr().out)
    elements = sum(torch.Size(info.shape).numel() for info in open_tensors(tiny_checkpoint).infos.values()) - 1  # logit_scale
    assert told["weight_bytes"] == 4 * elements
    assert told["peak_over_weights"] > 0.9
    assert told["seconds"] > 0


def test_memory_that_is_freed_again_counts_in_the_peak() -> None:
    def work() -> list[int]:
        block = torch.ones(50_000_000, dtype=torch.uint8)
        return [int(block[::4096].sum())]

    _, without = _with_peak(list)
    _, peak = _with_peak(work)
    assert peak - without > 45_000_000
