"""Everything of a run up to its first step, without its weights: `--dry_run`."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from library.generation.request import ImageRequest
from library.memory.pretend import PretendAccelerator
from library.memory.sizes import gib
from library.memory.trace import ACTIVATIONS, GRADIENTS, OPTIMIZER, WEIGHTS
from library.models.family import Family, ModelSource
from library.options.dataset_config import DatasetConfig
from library.options.scripts import TrainingOptions
from library.training.building import Recipe, make_setting, report
from library.training.events import EventLog
from library.training.fitting import Forecasts, attempts, fit, why_not
from library.training.forecast import BESIDE_TENSORS, Forecast
from library.training.resume import start_position
from library.training.state import SavedPlace
from library.training.trained_table import report_trained

log = logging.getLogger(__name__)

FITS, DOES_NOT_FIT, CANNOT_TELL = 0, 3, 4
"""Exit statuses of a dry run."""
_PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS)


@dataclass(frozen=True)
class Device:
    """The GPU that a run is to fit into."""

    memory: int | None
    """Bytes; None where there is no limit to compare with."""
    name: str

    @classmethod
    def of(cls, vram: float | None) -> "Device":
        """Return the one that was asked about, or that of this machine, or any where it has none.

        Args:
            vram: GiB of `--dry_run_vram`.
        """
        if vram is not None:
            return cls(int(vram * 2**30), f"a GPU with {vram:g} GiB")
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            return cls(properties.total_memory, f"{properties.name} ({gib(properties.total_memory)})")
        return cls(None, "a GPU")


def dry_run(
    recipe: Recipe,
    open_family: Callable[[ModelSource], Family],
    options: TrainingOptions,
    data: DatasetConfig,
    requests: Sequence[ImageRequest],
    saved: SavedPlace | None,
) -> None:
    """Check a run, and log what it will be and what it will need; of several processes, the first does.

    Args:
        recipe: of the script.
        open_family: opens the base model.
        options: of the run.
        data: the dataset definition, checked.
        requests: sample prompts; empty where no sample images are drawn.
        saved: where the resumed state stood, if any.

    Raises:
        UserError: something the person gave cannot be used.
        SystemExit: with one of the exit statuses of a dry run, where it does not fit or that cannot be told.
    """
    if int(os.environ.get("RANK", "0")):
        return
    accelerator = PretendAccelerator(torch.device("cpu"), None, int(os.environ.get("WORLD_SIZE", "1")))
    setting = make_setting(open_family, options, data, saved.seed if saved else None, EventLog(), accelerator)
    accumulation = options.length.gradient_accumulation_steps
    start = start_position(options.state, saved, setting.length, setting.batches_per_epoch, accumulation)
    report(setting)
    if reason := why_not(options):
        log.warning("%s", reason)
        raise SystemExit(CANNOT_TELL)
    device = Device.of(options.forecast.dry_run_vram)
    forecasts = Forecasts(recipe, setting, requests, tells=True)
    options, _ = fit(options, forecasts, saved)
    setting = replace(setting, options=options)
    tracing, forecast = forecasts.traced(options)
    if tracing.trained is not None:
        report_trained(setting, tracing.trained, tracing.defaults, start.update)
    log.info("Memory of %s\n%s", device.name, "\n".join(forecast_lines(forecast)))
    log.info("%s", verdict(forecast, device))
    if device.memory is not None and forecast.needed > device.memory:
        found = attempts(options, forecast, device.memory, forecasts, keeps_the_run=False)
        lines = [f"  {attempt.line()}{', too much' * (attempt.forecast.needed > device.memory)}" for attempt in found]
        log.info("What would help, the cheapest first, and what would be needed then:\n%s", "\n".join(lines or ["  nothing known"]))
        raise SystemExit(DOES_NOT_FIT)


def forecast_lines(forecast: Forecast) -> list[str]:
    """Return the table of a forecast, in GiB."""
    count, width, height = forecast.batch
    rows = [["GiB", *_PARTS, "together"]]
    for name, peak in forecast.phases.items():
        sizes = peak.in_gib()
        rows.append([name, *(f"{sizes[part]:.2f}" for part in (*_PARTS, "total"))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  " + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [*lines, f"  Traced, not measured; the largest batch is {count} × {width}x{height}."]


def verdict(forecast: Forecast, device: Device) -> str:
    """Say whether a run fits."""
    needed = gib(forecast.needed)
    beside = f"with {gib(BESIDE_TENSORS)} for the driver and its libraries"
    if device.memory is None:
        return f"On a GPU it would need {needed}, {beside}; --dry_run_vram tells whether it fits into one."
    if forecast.needed <= device.memory:
        return f"It fits: {needed} of {device.name} are needed, {beside}; {forecast.largest} needs most."
    return f"It does not fit: {needed} are needed, {beside}, and {forecast.largest} needs most; {device.name} is too small."
