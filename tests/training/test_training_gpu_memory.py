"""What is said of a GPU's memory while a run trains and at its end, from figures that are made up."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.memory.trace import Peak
from library.training.events import EventLog, RunEnd
from library.training.forecast import Forecast
from library.training.forecast_beside import ForecastBeside
from library.training.manifest import Manifest
from library.training.observing import paging_watch, peak_memory
from library.training.paging import IN_A_ROW, PagingSigns
from library.training.phases import LATENTS, SAMPLES, STEP, TEXTS
from library.training.position import Position
from library.training.step_meter import StepMeter

GIB = 2**30
TOTAL = 8 * GIB
FULL, ROOMY = int(7.8 * GIB), 6 * GIB
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def told(steps: Iterable[tuple[float, int]]) -> list[tuple[int, str]]:
    """Return after which steps, counted from 1, something is said, and what."""
    signs = PagingSigns()
    judged = [(number, signs.judge(seconds, reserved, TOTAL)) for number, (seconds, reserved) in enumerate(steps, start=1)]
    return [(number, said) for number, said in judged if said]


def test_steps_that_become_slow_while_memory_is_full_are_told_once() -> None:
    ((number, said),) = told([(1.0, ROOMY)] * 20 + [(7.0, FULL)] * 30)
    assert number == 20 + IN_A_ROW
    assert "Steps take 7.00 s, and took 1.00 s before" in said and "(7.80 GiB of 8.00 GiB)" in said


@pytest.mark.parametrize(
    "steps",
    [
        [(1.0, ROOMY)] * 20 + [(7.0, ROOMY)] * 30,
        [(1.0, FULL)] * 50,
        [(1.0, FULL)] * 20 + [(2.9, FULL)] * 30,
        [(1.0, FULL)] * 20 + ([(7.0, FULL)] * (IN_A_ROW - 1) + [(1.0, FULL)]) * 5,
        [(0.1, FULL)] + [(60.0, FULL)] * 2 + [(1.0, FULL)] * 20,
        [(1.0, ROOMY)] * 5 + [(7.0, FULL)] * 30,
    ],
    ids=["room is left", "as fast as ever", "a little slower", "slow now and then", "slow at first", "too few to compare with"],
)
def test_nothing_is_said_without_both_signs(steps: list[tuple[float, int]]) -> None:
    assert told(steps) == []


def test_more_than_the_gpu_has_is_told_at_once() -> None:
    ((number, said),) = told([(1.0, TOTAL + 1)] * 3)
    assert number == 1 and "more than the GPU has" in said


def pretended(device: torch.device, events: EventLog) -> Any:
    return SimpleNamespace(accelerator=SimpleNamespace(device=device, is_main_process=True), events=events)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The allocator's records of a GPU that is not there."""
    records = {"allocated_bytes.all.peak": 9 * GIB, "reserved_bytes.all.current": FULL}
    monkeypatch.setattr("torch.cuda.memory_stats", lambda device: records)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: records["allocated_bytes.all.peak"])
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: records.update({"allocated_bytes.all.peak": 2 * GIB}))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=TOTAL))
    return records


def test_a_run_is_watched_by_its_own_meter(
    gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    meter = StepMeter(CUDA)
    (watch,) = paging_watch(pretended(CUDA, EventLog()), meter)
    for seconds in [1.0] * 20 + [7.0] * 20:
        clock[0] += seconds
        for observer in (watch, meter):
            observer.after_update(Position())
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "Steps take 7.00 s" in caplog.text


@pytest.mark.parametrize("forecast_gib", [5, None])
def test_the_end_tells_what_was_measured_beside_the_forecast(
    gpu: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture, forecast_gib: int | None
) -> None:
    """What filled caches before is neither measured nor compared with."""
    caplog.set_level("INFO")
    sizes = {TEXTS: 20 * GIB, LATENTS: 30 * GIB, STEP: 4 * GIB, SAMPLES: (forecast_gib or 0) * GIB}
    forecast = Forecast({name: Peak(size, {}) for name, size in sizes.items()}) if forecast_gib else None
    events = EventLog(tmp_path / "events.jsonl")
    (peak,) = peak_memory(pretended(CUDA, events), ForecastBeside(None, forecast))
    manifest = Manifest(tmp_path / "run.json", {}, continues=False, memory=peak.figures)
    for observer in (peak, manifest):
        observer.before_training(Position())
    assert json.loads((tmp_path / "run.json").read_text())["memory"] is None
    gpu["allocated_bytes.all.peak"] = int(5.5 * GIB)
    for tell in (*events.at_end, manifest.ended):
        tell(RunEnd("complete", None, 1.0))
    expected = {"forecast": forecast_gib and forecast_gib * GIB, "measured": int(5.5 * GIB)}
    assert json.loads((tmp_path / "run.json").read_text())["memory"] == expected
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert event["kind"] == "memory" and {name: event[name] for name in expected} == expected
    assert "5.50 GiB" in caplog.text and ("5.00 GiB were forecast (+10.0%)" in caplog.text) == bool(forecast_gib)


def test_a_run_that_did_not_begin_measured_nothing(gpu: dict[str, int], tmp_path: Path) -> None:
    (peak,) = peak_memory(pretended(CUDA, EventLog(tmp_path / "events.jsonl")), ForecastBeside(None))
    peak.ended(RunEnd("failed", None, 1.0))
    assert peak.figures() is None and not (tmp_path / "events.jsonl").read_text()


def test_on_a_cpu_nobody_watches() -> None:
    events = EventLog()
    setting = pretended(CPU, events)
    assert not paging_watch(setting, StepMeter(CPU)) and not peak_memory(setting, ForecastBeside(None)) and not events.at_end
