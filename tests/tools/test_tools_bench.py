"""tools/bench.py: what is counted is what the step does, the result is complete, and wrong options are refused early."""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors import safe_open

from library.options.groups.bench import BenchOptions
from library.options.groups.compile import CompileOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from library.options.parse import parse
from library.training.loop import one_step
from tools import bench
from tools import bench_step as benchmark

SMALL = {"size": "tiny", "resolution": 64, "batch_size": 1, "network_dim": 4}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Let each test start accelerate in its own precision."""
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


def counted(precision: StepPrecisionOptions | None = None, **changed: object) -> float:
    """Counted TFLOP of one step."""
    options = BenchOptions(**(SMALL | changed))
    run, batch = benchmark.make_run(options, precision or StepPrecisionOptions(), OptimizerOptions())
    return benchmark.count_tera_flop(run, batch)


def test_twice_the_images_are_twice_the_arithmetic() -> None:
    # The embeddings of time and size are counted too, and each image has its own.
    assert counted(batch_size=2) == pytest.approx(2 * counted(), rel=1e-3)


def test_training_the_whole_model_takes_more_arithmetic_than_a_lora_and_checkpointing_takes_more_still() -> None:
    lora, whole = counted(), counted(mode="finetune")
    assert whole > 1.2 * lora
    assert counted(StepPrecisionOptions(gradient_checkpointing=True), mode="finetune") > 1.2 * whole


def test_a_step_changes_what_is_trained_and_nothing_else() -> None:
    run, batch = benchmark.make_run(BenchOptions(**SMALL), StepPrecisionOptions(), OptimizerOptions(learning_rate=1e-3))
    unet = run.step.parts.denoiser
    frozen_before = {name: value.clone() for name, value in unet.state_dict().items()}
    trained_before = [parameter.detach().clone() for parameter in run.trainable.module.parameters()]
    one_step(run, batch)
    assert any(not torch.equal(before, now) for before, now in zip(trained_before, run.trainable.module.parameters(), strict=True))
    assert all(torch.equal(frozen_before[name], value) for name, value in unet.state_dict().items())


def test_the_number_of_trained_parameters_is_that_of_the_model_or_of_its_adapters(tiny_checkpoint: Path) -> None:
    with safe_open(tiny_checkpoint, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if name.startswith("model.diffusion_model.")]  # noqa: SIM118
    whole, _ = benchmark.make_run(BenchOptions(**SMALL | {"mode": "finetune"}), StepPrecisionOptions(), OptimizerOptions())
    assert sum(parameter.numel() for parameter in whole.trainable.module.parameters()) == sum(math.prod(shape) for shape in shapes)
    of_rank = {}
    for rank in (4, 8):
        run, _ = benchmark.make_run(BenchOptions(**SMALL | {"network_dim": rank}), StepPrecisionOptions(), OptimizerOptions())
        of_rank[rank] = sum(parameter.numel() for parameter in run.trainable.module.parameters())
    assert of_rank[8] == 2 * of_rank[4]


def test_the_measured_matmul_rate_is_reached_by_a_product_timed_by_hand() -> None:
    device = torch.device("cpu")
    peak = benchmark.matmul_peak(device, torch.float32, seconds=0.1)
    side = benchmark.MATMUL_SIDE["cpu"]
    left, right = torch.randn(side, side), torch.randn(side, side)
    by_hand = 2 * side**3 / benchmark.timed(device, lambda: left @ right, 5) / 1e12
    assert 0.1 * by_hand < peak < 10 * by_hand


def test_the_result_is_printed_and_written_with_all_that_is_needed_to_repeat_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    argv = ["--size", "tiny", "--resolution", "64", "--batch_size", "2", "--steps", "2", "--warmup", "1", "--json", str(file)]
    bench.main(argv)
    written = json.loads(file.read_text())
    result = written["result"]
    assert written["command"].startswith("python tools/bench.py --size tiny --resolution 64")
    assert written["options"]["bench"]["batch_size"] == 2
    assert torch.__version__.startswith(written["versions"]["torch"])
    assert written["hardware"]["device"] in ("cpu", "cuda")
    assert result["images_per_second"] == pytest.approx(2 / result["seconds_per_step"])
    assert result["tera_flop_per_second"] == pytest.approx(result["tera_flop_per_step"] / result["seconds_per_step"])
    rate, peak = result["tera_flop_per_second"], result["matmul_peak_tera_flop_per_second"]
    assert 0 < result["share_of_matmul_peak"] == pytest.approx(rate / peak)
    steps = result["step_seconds"]
    assert 0 < steps["fastest"] <= steps["median"] <= steps["slowest"]
    assert steps["fastest"] <= result["seconds_per_step"] <= steps["slowest"]
    assert all(size > 0 for size in result["peak_memory_gib"].values())
    assert f"{result['seconds_per_step']:.4f} s/step" in capsys.readouterr().out


def test_blocks_are_compiled_where_that_is_asked_for_after_the_arithmetic_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compiled(family: Any, trainable: Any, denoiser: Any, backend: str) -> Any:
        asked.append(backend)
        return SimpleNamespace(num_compiled=7)

    monkeypatch.setattr(benchmark, "compiled_blocks", compiled)
    monkeypatch.setattr(benchmark, "count_tera_flop", lambda run, batch: asked.append("counted") or 1.0)
    options = BenchOptions(**SMALL | {"steps": 1, "warmup": 0})
    asked_for = CompileOptions(torch_compile=True, dynamo_backend="aot_eager")
    speed = benchmark.measure(options, StepPrecisionOptions(), OptimizerOptions(), asked_for)
    assert asked == ["counted", "aot_eager"] and speed.compiled_blocks == 7 and speed.kernels is None


def test_the_measurements_for_a_gpu_are_commands_that_the_benchmark_takes() -> None:
    folder = Path(bench.__file__).resolve().parent.parent
    echo = {"PATH": os.environ["PATH"], "PYTHON": "echo", "RESULTS": "out"}
    told = subprocess.run(
        ["bash", "benchmarks/on_a_gpu.sh"], cwd=folder, env=echo, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    commands = [shlex.split(line)[1:] for line in told if line.startswith("tools/bench.py ")]
    for command in commands:
        bench.check(parse(bench.BenchScriptOptions, command))
    names = [command[command.index("--json") + 1] for command in commands]
    assert len(names) == len(set(names)) >= 15 and names[0] == "out/gpu_lora.json"
    echo_some = ["bash", "benchmarks/on_a_gpu.sh", "lora4", "lora_nf4"]
    some = subprocess.run(echo_some, cwd=folder, env=echo, capture_output=True, text=True, check=True).stdout
    assert some.count("--json") == 2


def test_kernels_are_counted_and_those_that_take_longest_are_named() -> None:
    found = benchmark.Kernels.of([("gemm", 30.0), ("copy", 5.0), ("norm", 10.0), ("gemm", 20.0)])
    assert (found.number, found.busy_seconds) == (4, pytest.approx(65e-6))
    assert list(found.longest) == ["gemm", "norm", "copy"] and found.longest["gemm"] == pytest.approx(50e-6)


def test_each_step_is_timed_on_its_own_so_that_a_disturbed_one_shows() -> None:
    pauses = iter([0.01, 0.05, 0.01])
    seconds = benchmark.timed_each(torch.device("cpu"), lambda: time.sleep(next(pauses)), 3)
    assert seconds == pytest.approx([0.01, 0.05, 0.01], abs=0.01)


@pytest.mark.parametrize(("slowest", "told"), [(1.4, False), (1.6, True)])
def test_an_uneven_measurement_says_so(slowest: float, told: bool) -> None:
    steps = {"median": 1.0, "fastest": 1.0, "slowest": slowest}
    speed = benchmark.Speed(1.0, steps, 1.0, 1.0, 1.0, 1.0, 1.0, {"resident": 1.0}, 1, {})
    assert ("measure again" in bench.measured(speed)["single steps"]) == told


def test_a_trace_forecasts_the_peak_without_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--size", "tiny", "--resolution", "64", "--mode", "finetune", "--trace", "--json", str(tmp_path / "peak.json")])
    written = json.loads((tmp_path / "peak.json").read_text())
    assert "result" not in written
    parts = written["traced_peak_gib"]
    assert parts["total"] == pytest.approx(sum(size for name, size in parts.items() if name != "total"), abs=0.01)
    assert parts["optimizer"] == pytest.approx(2 * parts["weights"], rel=0.05)  # AdamW
    shown = capsys.readouterr().out
    assert "traced, not measured" in shown and "s/step" not in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resolution", "1000"], ["--resolution 1000", "992 and 1024"]),
        (["--mode", "loora"], ["loora", "lora", "finetune"]),
        (["--stepz", "3"], ["--stepz", "--steps"]),
        (["--batch_size", "0"], ["batch_size"]),
        (["--optimizer_type", "Prodigy", "--trace"], ["The memory of Prodigy cannot be forecast"]),
        (["--optimizer_type", "Prodigy", "--count_operations"], ["--count_operations cannot step Prodigy"]),
        (["--torch_compile", "--trace"], ["--torch_compile has no effect on what is traced"]),
        (["--fp8_base", "--mode", "finetune"], ["--fp8_base holds frozen weights in few bits"]),
        (["--full_bf16"], ["--full_bf16", "--mixed_precision bf16"]),
        (["--optimizer_type", "AdamX"], ["there is no optimizer 'AdamX'"]),
    ],
)
def test_wrong_options_end_with_status_2_before_torch_is_imported(arguments: list[str], words: list[str]) -> None:
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        f"sys.argv = ['tools/bench.py', *{arguments!r}]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    root = Path(bench.__file__).resolve().parent.parent
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stdout.strip() == "False"
    assert all(word in ended.stderr for word in words), ended.stderr
