"""Which options make a run fit into the memory of a device: found by forecasting it with them, the cheapest in time first."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from library.generation.request import ImageRequest
from library.memory.sizes import gib
from library.memory.trace import Peak
from library.memory.traceable import untraceable
from library.options.checks_distributed import what_divides
from library.options.errors import UsageError
from library.options.memory_changes import CHANGES, Change, levels, with_changes
from library.options.scripts import TrainingOptions
from library.training.building import Recipe
from library.training.forecast import Forecast, Tracing, needed_for, quiet
from library.training.setting import Setting
from library.training.state import SavedPlace

log = logging.getLogger(__name__)

_MISSING = object()
"""Equals no value that a state may have."""


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
        The options, and the forecast with them; None without a budget.

    Raises:
        UsageError: nothing makes it fit, or the memory of the run cannot be forecast.
    """
    options, budget = setting.options, setting.options.forecast.budget
    if budget is None:
        return options, None
    if reason := why_not(options):
        raise UsageError([f"--memory_budget: {reason}"])
    trace = tracer(recipe, setting, requests, "cuda")
    if saved is not None and saved.identity is not None:
        return go_on(options, saved.identity["options"], trace)
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


def go_on(
    options: TrainingOptions, recorded: Mapping[str, Mapping[str, Any]], trace: Callable[[TrainingOptions], Forecast]
) -> tuple[TrainingOptions, Forecast]:
    """Return the options of a resumed run with what was picked when it began, and their forecast; tell both.

    Args:
        options: as they were given, with a budget.
        recorded: see `picked_before`.
        trace: forecasts a run with other options.
    """
    chosen = picked_before(options, recorded)
    options = with_changes(options, chosen)
    forecast, text = trace(options), options.forecast.memory_budget
    flags = " ".join(change.flags for change in chosen) or "as it began"
    log.info("With --memory_budget %s, the resumed run goes on %s: %s.", text, flags, gib(forecast.needed))
    if forecast.needed > (options.forecast.budget or 0):
        log.warning(
            "That is more than --memory_budget %s: nothing is picked anew for a run that is resumed. Add what saves more and does "
            "not change its numbers, such as --gradient_checkpointing or --blocks_to_swap.",
            text,
        )
    return options, forecast


def picked_before(options: TrainingOptions, recorded: Mapping[str, Mapping[str, Any]]) -> list[Change]:
    """Return the changes that a state has, that a budget may have picked, and that the person did not give.

    Args:
        options: as they were given.
        recorded: see `library.options.resuming.compared_options`.
    """
    values = {name: value for kind in recorded.values() for name, value in kind.items()}
    found: list[Change] = []
    for change in CHANGES:
        wanted = {name: value for new in change.values.values() for name, value in new.items()}
        is_recorded = all(values.get(name, _MISSING) == value for name, value in wanted.items())
        if change.keeps_the_run and is_recorded and change.suits(options):
            found.append(change)
    return found


def why_not(options: TrainingOptions) -> str | None:
    """Say in a sentence why the memory of a run cannot be forecast; None where it can."""
    if reason := untraceable(options.optimizer):
        return reason
    if divider := what_divides(options.distributed):
        return (
            f"The memory of a run that {divider} divides over its processes is not forecast. Leave it out to see what a process "
            "needs that has everything."
        )
    return None
