"""The forecast that is made beside a run: what is handed over, what comes back, and that no process stays behind."""

import json
import logging
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.memory.pretend import PretendAccelerator
from library.memory.trace import WEIGHTS, Peak
from library.models.sdxl.family import SdxlFamily
from library.options.parse import parse
from library.options.scripts import SdxlTrainNetworkOptions
from library.training import forecast_beside
from library.training.base_networks import open_with_base_weights
from library.training.building import make_setting
from library.training.events import EventLog, RunEnd
from library.training.forecast import Forecast, Tracing, needed_for
from library.training.forecast_beside import ForecastBeside, ForecastJob, facts_of, forecast_of, start_process
from library.training.forecast_process import LENGTH
from library.training.inputs import dataset_definition
from library.training.network_recipe import NetworkRecipe
from library.training.peak_memory import PeakMemory
from library.training.phases import SAMPLES, STEP, TEXTS
from library.training.position import Position
from tests.cli.training_commands import arguments, write_dataset

GIB = 2**30
EXPECTED = Forecast({TEXTS: Peak(9 * GIB, {}), STEP: Peak(4 * GIB, {WEIGHTS: 4 * GIB}), SAMPLES: Peak(5 * GIB, {})}, (2, 64, 64))
JOB: Any = ("what a process is handed",)
ANSWERS = f"import sys, time; sys.stdin.buffer.read(8); print({json.dumps(json.dumps(facts_of(EXPECTED)))})"
SLEEPS = "import time; time.sleep(60)"


def runs(code: str) -> Callable[[], subprocess.Popen[bytes]]:
    return lambda: subprocess.Popen([sys.executable, "-Sc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_run_can_be_handed_over_and_is_forecast_as_it_would_be_here(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    argv = arguments(tiny_checkpoint, write_dataset(tmp_path, photos, count=2), tmp_path, "--cache_latents")
    options = parse(SdxlTrainNetworkOptions, argv)
    open_family: Any = partial(open_with_base_weights, SdxlFamily.open, options.network)
    accelerator = PretendAccelerator(torch.device("cpu"), None)
    setting = make_setting(open_family, options, dataset_definition(options), None, EventLog(), accelerator)
    job = ForecastJob.of(NetworkRecipe(options), open_family, (), setting)
    setting.dataset.texts = SimpleNamespace()  # type: ignore[assignment]  # what a run caches later stays with it
    handed = pickle.loads(pickle.dumps(job))
    assert handed.setting.dataset.texts is None
    assert forecast_of(json.loads(json.dumps(facts_of(handed.done())))) == Tracing(NetworkRecipe(options), setting, ()).forecast()


@pytest.mark.parametrize(("total", "level"), [(8, logging.INFO), (5.5, logging.WARNING)])
def test_it_begins_after_the_first_update_is_told_once_and_stands_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, total: float, level: int
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(forecast_beside, "start_process", runs(ANSWERS))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 4 * GIB)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=int(total * GIB)))
    beside = ForecastBeside(JOB)
    peak = PeakMemory(torch.device("cuda"), beside, EventLog())
    peak.before_training(Position())
    assert beside.forecast is None
    peak.after_update(Position(update=1))
    beside.wait(30)
    assert beside.forecast == EXPECTED
    for update in (2, 3):
        peak.after_update(Position(update=update))
    peak.ended(RunEnd("complete", None, 1.0))
    *_, said, end = caplog.records
    needed = f"{needed_for(5 * GIB) / GIB:.2f} GiB"
    assert said.levelno == level and needed in said.getMessage() and SAMPLES in said.getMessage()
    assert "4.00 GiB; 5.00 GiB were forecast (-20.0%)" in end.getMessage()
    assert caplog.text.count("Forecast: ") == 1


def test_a_run_that_is_stopped_waits_for_nothing_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(runs(SLEEPS)())
        return started[0]

    monkeypatch.setattr(forecast_beside, "start_process", start)
    beside = ForecastBeside(JOB)
    beside.start()
    while not started:
        time.sleep(0.01)
    began = time.monotonic()
    PeakMemory(torch.device("cuda"), beside, EventLog()).ended(RunEnd("stopped", None, 1.0))
    assert started[0].poll() is not None and time.monotonic() - began < 30


def test_a_run_that_was_complete_at_once_waits_for_no_forecast() -> None:
    began = time.monotonic()
    PeakMemory(torch.device("cuda"), ForecastBeside(JOB), EventLog()).ended(RunEnd("complete", None, 0.0))
    assert time.monotonic() - began < 10


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_goes_wrong_costs_the_forecast_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> subprocess.Popen[bytes]:
        raise OSError("no more processes")

    for start, job in ((refuse, JOB), (runs("raise SystemExit(1)"), JOB), (runs("print('{')"), JOB), (runs(ANSWERS), lambda: None)):
        monkeypatch.setattr(forecast_beside, "start_process", start)
        beside = ForecastBeside(job)
        beside.start()
        beside.wait(30)
        assert beside.forecast is None


class Known:
    """A job that needs no model."""

    def done(self) -> Forecast:
        return EXPECTED


def test_the_process_is_of_this_suite_in_whatever_folder_the_run_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "__init__.py").write_text("raise RuntimeError('another trainer')")
    monkeypatch.chdir(tmp_path)
    process, handed = start_process(), pickle.dumps(Known())
    assert process.stdin is not None and process.stdout is not None
    with process:
        process.stdin.write(LENGTH.pack(len(handed)) + handed)
        process.stdin.flush()
        assert forecast_of(json.loads(process.stdout.read())) == EXPECTED


class Sleep:
    """Takes a minute to be read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return time.sleep, (60,)


def test_the_process_ends_when_the_run_is_gone() -> None:
    process = start_process()
    assert process.stdin is not None
    handed = pickle.dumps(Sleep())
    process.stdin.write(LENGTH.pack(len(handed)) + handed)
    process.stdin.close()
    assert process.wait(30) != 0
