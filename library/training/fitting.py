"""Which options make a run fit into the memory of a device: found by forecasting it with them, the cheapest in time first."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from library.generation.request import ImageRequest
from library.memory.trace import Peak
from library.memory.traceable import untraceable
from library.options.errors import UsageError
from library.options.memory_changes import PICKED, Change, levels, with_changes
from library.options.scripts import TrainingOptions
from library.training.building import Recipe
from library.training.forecast import Forecast, Tracing, needed_for, quiet
from library.training.setting import Setting
from library.training.state import SavedPlace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """A run with some changes, and what it needs."""

    options: TrainingOptions
    changes: tuple[Change, ...]
    forecast: Forecast

    @property
    def flags(self) -> str:
        """The changes as they are typed."""
        return " ".join(change.flags for change in self.changes)

    def line(self) -> str:
        """Return flags, forecast and cost, for people."""
        costs = "; ".join(dict.fromkeys(change.cost for change in self.changes))
        return f"{self.flags}: {gib(self.forecast.needed)} ({costs})"


def attempts(
    options: TrainingOptions,
    forecast: Forecast,
    memory: int,
    trace: Callable[[TrainingOptions], Forecast],
    *,
    keeps_the_run: bool,
) -> Iterator[Attempt]:
    """Yield more and more changes with their forecasts, until one fits; those that cannot save enough are not traced.

    Args:
        options: as they were given.
        forecast: of them.
        memory: bytes of the device.
        trace: forecasts a run with other options.
        keeps_the_run: leave out changes that train something else.
    """
    found = list(levels(options, keeps_the_run=keeps_the_run))
    for number, (changed, changes) in enumerate(found, start=1):
        if number < len(found) and needed_for(least(forecast.peak, changes)) > memory:
            continue
        attempt = Attempt(changed, changes, trace(changed))
        if attempt.forecast.needed <= memory:
            yield leanest(options, attempt, memory, trace)
            return
        yield attempt


def least(peak: Peak, changes: Sequence[Change]) -> int:
    """Return bytes below which changes cannot bring a peak."""
    left = dict(peak.parts)
    for change in changes:
        for part, share in change.saves.items():
            left[part] = min(left[part], int(peak.parts[part] * max(1 - share, 0)))
    return sum(left.values())


def leanest(options: TrainingOptions, attempt: Attempt, memory: int, trace: Callable[[TrainingOptions], Forecast]) -> Attempt:
    """Leave out the changes before the last one, where that fits too: what is not needed costs nothing then."""
    if len(attempt.changes) == 1:
        return attempt
    alone = attempt.changes[-1:]
    changed = with_changes(options, alone)
    forecast = trace(changed)
    return Attempt(changed, alone, forecast) if forecast.needed <= memory else attempt


def tracer(
    recipe: Recipe, setting: Setting, requests: Sequence[ImageRequest], device_type: str
) -> Callable[[TrainingOptions], Forecast]:
    """Return what forecasts a run with other options, without a word of what is built on the way."""

    def trace(options: TrainingOptions) -> Forecast:
        with quiet():
            return Tracing(with_options(recipe, options), replace(setting, options=options), requests, device_type).forecast()

    return trace


def with_options(recipe: Recipe, options: TrainingOptions) -> Recipe:
    """Return the recipe of other options."""
    changed: Any = recipe
    with_them: Recipe = replace(changed, options=options)
    return with_them


def fit(
    recipe: Recipe, setting: Setting, requests: Sequence[ImageRequest], saved: SavedPlace | None
) -> tuple[TrainingOptions, Forecast | None]:
    """Pick the options with which a run keeps within `--memory_budget`, and tell them.

    Args:
        recipe: of the script.
        setting: of the run.
        requests: sample prompts; empty where no sample images are drawn.
        saved: where the resumed state stood: a run goes on with what was picked for it.

    Returns:
        The options, and the forecast with them; None where they come with the state.

    Raises:
        UsageError: nothing makes it fit.
    """
    options, budget = setting.options, setting.options.forecast.budget
    if budget is None:
        return options, None
    if saved is not None and saved.identity is not None:
        return picked_before(options, saved.identity["options"]), None
    if reason := untraceable(options.optimizer):
        raise UsageError([reason])
    trace = tracer(recipe, setting, requests, "cuda")
    forecast = trace(options)
    if forecast.needed <= budget:
        log.info("The run keeps within --memory_budget %s as it is: %s.", options.forecast.memory_budget, gib(forecast.needed))
        return options, forecast
    tried = list(attempts(options, forecast, budget, trace, keeps_the_run=True))
    closest = min(tried, key=lambda attempt: attempt.forecast.needed, default=None)
    if closest is None or closest.forecast.needed > budget:
        nearest = f"needs {gib(forecast.needed)}" + (f", and with {closest.line()}" if closest else "")
        raise UsageError(
            [
                f"--memory_budget {options.forecast.memory_budget}: the run {nearest}. Give it more, a smaller batch size or "
                "--resolution, or train in fewer parts; --dry_run tells what needs most."
            ]
        )
    log.info("To keep within --memory_budget %s, the run gets %s", options.forecast.memory_budget, closest.line())
    return closest.options, closest.forecast


def picked_before(options: TrainingOptions, recorded: dict[str, dict[str, Any]]) -> TrainingOptions:
    """Return the options with what a state says was picked for its run.

    Args:
        options: as they were given.
        recorded: see `library.options.resuming.compared_options`.
    """
    values = {name: value for kind in recorded.values() for name, value in kind.items()}
    for group, name in PICKED:
        if name in values:
            update = {name: values[name]}
            options = replace(options, **{group: getattr(options, group).model_copy(update=update)})
    return options


def gib(size: int) -> str:
    """Return a size for people."""
    return f"{size / 2**30:.2f} GiB"
