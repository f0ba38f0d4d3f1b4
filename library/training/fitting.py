"""Which options make a run fit into the memory of a device: found by forecasting it with them, the cheapest in time first."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from library.generation.request import ImageRequest
from library.memory.sizes import gib
from library.memory.trace import ACTIVATIONS, Peak
from library.memory.traceable import untraceable
from library.options.checks import find_problems
from library.options.checks_distributed import what_divides
from library.options.errors import UsageError
from library.options.memory_changes import CHANGES, Change, levels, no_swapping, with_changes, without_covered
from library.options.scripts import TrainingOptions
from library.training.building import Recipe
from library.training.forecast import Forecast, Tracing, needed_for, quiet
from library.training.setting import Setting
from library.training.state import SavedPlace
from library.training.stepped_state import no_step

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
) -> list[Attempt]:
    """Return the changes that were tried, fewer first: the last ones are the cheapest that fit, or all of them where none do.

    Each trace takes its time, so what saves most is tried first; where that is not enough, nothing is. Else the least of the levels
    that is enough is looked for by halves, above those that cannot save enough.

    Args:
        options: as they were given.
        forecast: of them.
        memory: bytes of the device.
        trace: forecasts a run with other options.
        keeps_the_run: leave out changes that train something else.
    """
    found = list(levels(options, keeps_the_run=keeps_the_run))
    if not found:
        return []
    low, high = 0, len(found) - 1
    tried = {high: Attempt(*found[high], trace(found[high][0]))}
    if tried[high].forecast.needed > memory:
        return [tried[high]]
    while low < high and needed_for(least(forecast.peak, found[low][1])) > memory:
        low += 1
    while low < high:
        middle = (low + high) // 2
        tried[middle] = Attempt(*found[middle], trace(found[middle][0]))
        low, high = (low, middle) if tried[middle].forecast.needed <= memory else (middle + 1, high)
    fewer = [tried[number] for number in sorted(tried) if number < high]
    return [*fewer, leanest(options, tried[high], forecast.peak, memory, trace)]


def least(peak: Peak, changes: Sequence[Change]) -> int:
    """Return bytes below which changes cannot bring a peak."""
    left = dict(peak.parts)
    for change in changes:
        for part, share in change.saves.items():
            left[part] = min(left[part], int(peak.parts[part] * max(1 - share, 0)))
    return sum(left.values())


def leanest(
    options: TrainingOptions, attempt: Attempt, unchanged: Peak, memory: int, trace: Callable[[TrainingOptions], Forecast]
) -> Attempt:
    """Leave out the changes before the last one that are not needed beside it: all, or one by one, the costliest first.

    Args:
        options: as they were given.
        attempt: fits.
        unchanged: the peak without changes.
        memory: bytes of the device.
        trace: forecasts a run with other options.
    """

    def tried(changes: tuple[Change, ...]) -> Attempt | None:
        changed = with_changes(options, changes)
        if find_problems(changed):
            return None
        found = Attempt(changed, changes, trace(changed))
        return found if found.forecast.needed <= memory else None

    if len(attempt.changes) == 1:
        return attempt
    if alone := tried(attempt.changes[-1:]):
        return alone
    for change in reversed(attempt.changes[:-1]):
        fewer = tuple(each for each in attempt.changes if each is not change)
        if len(fewer) > 1 and not _is_needed(change, attempt, unchanged, memory):
            attempt = tried(fewer) or attempt
    return attempt


def _is_needed(change: Change, attempt: Attempt, unchanged: Peak, memory: int) -> bool:
    """Tell without a trace whether a change has to stay."""
    if set(change.saves) == {ACTIVATIONS}:
        parts = attempt.forecast.peak.parts
        return needed_for(sum(parts.values()) - parts[ACTIVATIONS] + unchanged.parts[ACTIVATIONS]) > memory
    has_state_elsewhere = attempt.options.optimizer.optimizer_states == "host"
    return has_state_elsewhere and "optimizer_type" in change.values.get("optimizer", ())  # a quarter of it is transferred then


class Forecasts:
    """Forecasts of a run on a GPU with other options, each made once, without a word of what is built on the way.

    Args:
        recipe: of the script.
        setting: of the run.
        requests: sample prompts; empty where no sample images are drawn.
        tells: let the first of them tell what making the run would.
    """

    def __init__(self, recipe: Recipe, setting: Setting, requests: Sequence[ImageRequest], *, tells: bool = False) -> None:
        self._recipe = recipe
        self._setting = setting
        self._requests = requests
        self._tells = tells
        self._made: list[tuple[TrainingOptions, Tracing, Forecast]] = []

    def __call__(self, options: TrainingOptions) -> Forecast:
        """Return the forecast with some options."""
        return self.traced(options)[1]

    def traced(self, options: TrainingOptions) -> tuple[Tracing, Forecast]:
        """Return what was built with some options, and its forecast."""
        for known, tracing, forecast in self._made:
            if known == options:
                return tracing, forecast
        recipe, setting = with_options(self._recipe, options), replace(self._setting, options=options)
        tracing = Tracing(recipe, setting, self._requests)
        with nullcontext() if self._tells and not self._made else quiet():
            forecast = tracing.forecast()
        self._made.append((options, tracing, forecast))
        return tracing, forecast


def with_options(recipe: Recipe, options: TrainingOptions) -> Recipe:
    """Return the recipe of other options."""
    changed: Any = recipe
    with_them: Recipe = replace(changed, options=options)
    return with_them


def fit(
    options: TrainingOptions, trace: Callable[[TrainingOptions], Forecast], saved: SavedPlace | None
) -> tuple[TrainingOptions, Forecast | None]:
    """Pick the options with which a run keeps within `--memory_budget`, and tell them.

    Args:
        options: of the run.
        trace: forecasts it with other options, on a GPU.
        saved: where the resumed state stood: a run goes on with what was picked for it.

    Returns:
        The options, and the forecast with them; None without a budget.

    Raises:
        UsageError: nothing makes it fit, or the memory of the run cannot be forecast.
    """
    budget = options.forecast.budget
    if budget is None:
        return options, None
    if reason := why_not(options):
        raise UsageError([f"--memory_budget: {reason}"])
    if saved is not None and saved.identity is not None:
        return go_on(options, saved.identity["options"], trace)
    forecast = trace(options)
    if forecast.needed <= budget:
        log.info("The run keeps within --memory_budget %s as it is: %s.", options.forecast.memory_budget, gib(forecast.needed))
        return options, forecast
    tried = attempts(options, forecast, budget, trace, keeps_the_run=True)
    closest = min(tried, key=lambda attempt: attempt.forecast.needed, default=None)
    if closest is None or closest.forecast.needed > budget:
        nearest = f"needs {gib(forecast.needed)}" + (f", and with {closest.line()}" if closest else "")
        largest = (closest.forecast if closest else forecast).largest
        why = no_swapping(options)
        raise UsageError(
            [
                f"--memory_budget {options.forecast.memory_budget}: the run {nearest}. {largest.capitalize()} needs most. "
                "Give it more, a smaller batch size or --resolution, or train in fewer parts."
                + (f" Blocks of the U-Net cannot be swapped: {why}" if why else "")
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
            found = without_covered(found, change)
    return found


def why_not(options: TrainingOptions) -> str | None:
    """Say in a sentence why the memory of a run cannot be forecast; None where it can."""
    if untraceable(options.optimizer):
        with quiet():
            reason = no_step(options.optimizer)
        if reason:
            return reason
    if divider := what_divides(options.distributed):
        return (
            f"The memory of a run that {divider} divides over its processes is not forecast. Leave it out to see what a process "
            "needs that has everything."
        )
    return None
