"""The forecast of a run's memory, made while it trains: in a process of its own, of low priority, that never touches the GPU.

It takes half a minute of one CPU, which nobody should wait for before the first step. The process is handed the run as it was set
up, before any cache was filled, over its standard input, and ends when that is closed: however the run ends, none stays behind.
"""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from library.dataset.foreign import ForeignDataset
from library.generation.request import ImageRequest
from library.memory.pretend import PretendAccelerator
from library.memory.trace import Peak
from library.models.family import Family, ModelSource
from library.training.building import Recipe
from library.training.events import EventLog
from library.training.fitting import why_not
from library.training.forecast import Forecast, Tracing, quiet
from library.training.forecast_process import LENGTH
from library.training.preparation import model_source
from library.training.setting import Setting

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForecastJob:
    """A run to forecast, of what can be pickled."""

    recipe: Recipe
    open_family: Callable[[ModelSource], Family]
    requests: Sequence[ImageRequest]
    num_processes: int
    setting: Any
    """The setting without what is open: family, objective, accelerator and events."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        open_family: Callable[[ModelSource], Family],
        requests: Sequence[ImageRequest],
        setting: Setting,
    ) -> "ForecastJob":
        """Take what a forecast needs of a run whose caches are not filled yet; see `library.training.forecast.Tracing`."""
        nothing: Any = None
        dataset = copy.copy(setting.dataset)  # caches that the run fills later are not handed over
        alone = replace(setting, family=nothing, objective=nothing, accelerator=nothing, dataset=dataset, events=nothing)
        return cls(recipe, open_family, requests, setting.accelerator.num_processes, alone)

    def done(self) -> Forecast:
        """Make the forecast; of the model, only headers of files are read."""
        options = self.setting.options
        accelerator: Any = PretendAccelerator(torch.device("cpu"), None, self.num_processes)
        with quiet():
            family = self.open_family(model_source(options.model, options.precision))
            setting = replace(self.setting, family=family, accelerator=accelerator, events=EventLog())
            return Tracing(self.recipe, setting, self.requests).forecast()


class ForecastBeside:
    """A forecast that is there from the beginning, or comes some time after `start`, or never.

    Args:
        job: what is to be forecast, where that can be.
        forecast: where it was made already.
    """

    def __init__(self, job: ForecastJob | None, forecast: Forecast | None = None) -> None:
        self._job = job
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._began = time.monotonic()
        self.forecast = forecast
        if job is None:
            self._is_over.set()

    @classmethod
    def of_run(
        cls,
        recipe: Recipe,
        open_family: Callable[[ModelSource], Family],
        requests: Sequence[ImageRequest],
        setting: Setting,
        forecast: Forecast | None,
    ) -> "ForecastBeside":
        """Return that of a run whose caches are not filled yet; only the main process of one that can be forecast makes one.

        Args:
            recipe: of the script.
            open_family: opens the base model.
            requests: sample prompts.
            setting: of the run.
            forecast: where it was made already.
        """
        is_wanted = forecast is None and setting.accelerator.is_main_process
        if not is_wanted or isinstance(setting.dataset, ForeignDataset) or why_not(setting.options) is not None:
            return cls(None, forecast)
        return cls(ForecastJob.of(recipe, open_family, requests, setting))

    def start(self) -> None:
        """Begin, without waiting for anything."""
        if self._job is not None and self.forecast is None:
            self._began = time.monotonic()
            threading.Thread(target=self._forecast, args=(self._job,), daemon=True, name="forecast").start()
            self._job = None

    def wait(self, patience: float) -> None:
        """Wait until it is over, or was begun so many seconds ago; one that was not begun is not waited for."""
        if self._job is not None:
            return
        left = self._began + patience - time.monotonic()
        if left > 0 and not self._is_over.is_set():
            log.info("The forecast of memory comes in a moment; Ctrl+C goes without.")
            self._is_over.wait(left)

    def stop(self) -> None:
        """End the process, if it still runs."""
        with self._lock:
            self._is_over.set()
            if self._process is not None and self._process.poll() is None:
                self._process.kill()
                self._process.wait()

    def _forecast(self, job: ForecastJob) -> None:
        try:
            handed = pickle.dumps(job)
            with self._lock:
                if self._is_over.is_set():
                    return
                process = self._process = start_process()
            if process.stdin is not None and process.stdout is not None:
                process.stdin.write(LENGTH.pack(len(handed)) + handed)
                process.stdin.flush()
                answer = process.stdout.read()
                process.wait()
                self.forecast = forecast_of(json.loads(answer)) if answer else None
        except Exception as error:  # whatever it is, the run is worth more
            log.debug("The memory of the run could not be forecast: %r", error)
        finally:
            self._is_over.set()


def start_process() -> subprocess.Popen[bytes]:
    """Start what makes a forecast, out of reach of the terminal's Ctrl+C: that is for the run, which ends it."""
    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "IDLE_PRIORITY_CLASS", 0)
    places = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "library.training.forecast_process"],  # -P: not what is called so in the folder one is in
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **places, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        creationflags=flags,
    )


def facts_of(forecast: Forecast) -> dict[str, Any]:
    """Return a forecast as JSON can hold it."""
    peaks = {name: {"total": peak.total, "parts": dict(peak.parts)} for name, peak in forecast.phases.items()}
    return {"phases": peaks, "batch": list(forecast.batch)}


def forecast_of(facts: Mapping[str, Any]) -> Forecast:
    """Return the forecast that `facts_of` described."""
    return Forecast({name: Peak(**peak) for name, peak in facts["phases"].items()}, tuple(facts["batch"]))
