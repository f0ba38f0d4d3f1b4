"""The memory tables of the documentation say what the committed results say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from tools.bench_trace import forecast

ROOT = Path(__file__).resolve().parents[2]
RESULTS = {
    path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "benchmarks/results").glob("traced_*.json"))
}
MARGIN = 0.05
"""Share by which a forecast may move before it is another one."""
FIGURES = {"table_gb": 1, "forecast_gb": 1, "ratio": 2}
"""Of the table of sd-scripts, with the decimals shown."""
COLUMNS = ("weights", "gradients", "optimizer", "activations", "total")


def rows(page: str, pattern: str) -> list[tuple[str, ...]]:
    return re.findall(pattern, (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE)


def training_row(options: dict[str, Any]) -> tuple[str, str]:
    """Return the first two cells that docs/training.md has for a result."""
    precision, optimizer = options["precision"], options["optimizer"]
    weights = "bfloat16" if precision["full_bf16"] else "float32"
    flags = [f"--mixed_precision {precision['mixed_precision']}"] if precision["mixed_precision"] != "no" else []
    flags += ["--full_bf16"] if precision["full_bf16"] else []
    groups = optimizer["fused_optimizer_groups"]
    how = "`--fused_backward_pass`" if optimizer["fused_backward_pass"] else "stepped after the backward pass"
    return f"{weights}, `{' '.join(flags)}`" if flags else weights, f"`--fused_optimizer_groups {groups}`" if groups else how


def test_every_traced_result_has_its_figures_in_the_table_of_performance() -> None:
    table = rows("performance.md", r"^\| `(traced_\w+\.json)` \| .*? \| ([\d.| ]+) \|$")
    shown = {name: figures.split(" | ") for name, figures in table}
    expected = {name: [f"{result['traced_peak_gib'][column]:.2f}" for column in COLUMNS] for name, result in RESULTS.items()}
    assert shown == expected


def test_the_table_of_training_has_the_same_peaks() -> None:
    peaks = {
        training_row(result["options"]): f"{result['traced_peak_gib']['total']:.1f}"
        for result in RESULTS.values()
        if result["options"]["bench"]["mode"] == "finetune"
        and result["options"]["optimizer"]["optimizer_type"] == "Adafactor"
        and not result["options"]["precision"].get("blocks_to_swap")
    }
    table = rows("training.md", r"^\| (\S.*?) \| (.+?) \| ([\d.]+) GiB \|$")
    assert len(table) == 6
    for weights, how, peak in table:
        assert peaks[weights, how] == peak, (weights, how)


@pytest.mark.parametrize("name", ["traced_lora_nf4.json"])  # a trace takes 16 seconds of one CPU: one row stands for all
def test_a_forecast_of_the_real_size_is_still_the_committed_one(name: str) -> None:
    """The options are those of the result's own command; a forecast that sank wants the result made again."""
    options, before = RESULTS[name]["options"], RESULTS[name]["traced_peak_gib"]
    asked = BenchOptions(**options["bench"]), StepPrecisionOptions(**options["precision"]), OptimizerOptions(**options["optimizer"])
    assert (asked[0].size, asked[0].resolution) == ("full", 1024)
    assert forecast(*asked).in_gib()["total"] == pytest.approx(before["total"], rel=MARGIN)


def test_the_tables_of_sd_scripts_stand_beside_their_forecasts() -> None:
    done = json.loads((ROOT / "benchmarks/results/forecast_table.json").read_text(encoding="utf-8"))["rows"]
    plain = {(each["row"], each["batch_size"], each["optimizer"]): each for each in done if not each["added"]}

    def figures(each: dict[str, Any], *names: str) -> tuple[str, ...]:
        return tuple(f"{each[name]:.{FIGURES[name]}f}" for name in names)

    assert rows("performance.md", r"^\| (R\d+) \| .+? \| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.–]+) \|$") == [
        (row, str(size), *figures(each, *FIGURES), *(figures(beside, "forecast_gb") if beside else "–"))
        for (row, size, optimizer), each in plain.items()
        if optimizer == "AdamW8bit"
        for beside in [plain.get((row, size, "AdamW"))]
    ]
    assert rows("performance.md", r"^\| (R\d+) \| (\d) \| (\w+), `(.+?)` \| ([\d.]+) \| ([\d.]+) \|$") == [
        (each["row"], str(each["batch_size"]), each["optimizer"], each["added"], *figures(each, "forecast_gb", "ratio"))
        for each in done
        if each["added"]
    ]


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_names_the_command_that_made_it(name: str) -> None:
    assert RESULTS[name]["command"].endswith(f"--trace --json benchmarks/results/{name}")
