"""What a state remembers of its run, and whether the run that resumes it is the same one."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from library.dataset.identity import DIGESTS, dataset_identity
from library.files.hashes import sampled_hash
from library.options.errors import UserError
from library.options.resuming import DECIDES, ROUNDS, compared_options, defaults
from library.options.scripts import TrainingOptions
from library.training.setting import Setting
from library.training.state import SavedPlace

log = logging.getLogger(__name__)

Identity = dict[str, Any]
"""What JSON can hold: `options`, `models`, `data`, `processes` and `updates`."""


def identity_of(setting: Setting) -> Identity:
    """Describe a run, so that a state can be resumed by the same run only."""
    processes = setting.accelerator.num_processes
    return {
        "options": compared_options(setting.options),
        "seed": setting.seed,
        "models": models_identity(setting.options),
        "data": dataset_identity(setting.dataset, processes),
        "processes": processes,
        "updates": setting.length.total_updates,
    }


def models_identity(options: TrainingOptions) -> dict[str, str | None]:
    """Return for each model file that a run starts from the end of its path and a hash; names on the hub stand for themselves."""
    named = {"--pretrained_model_name_or_path": options.model.pretrained_model_name_or_path, "--vae": options.model.vae}
    network = getattr(options, "network", None)
    for number, path in enumerate(getattr(network, "base_weights", None) or (), start=1):
        named[f"file {number} of --base_weights"] = path
    return {name: None if path is None else _file_identity(Path(path)) for name, path in named.items()}


def check_same_run(saved: SavedPlace, now: Identity, options: TrainingOptions) -> None:
    """Compare a run with the one that saved a state, and say what differs.

    Args:
        saved: the state.
        now: of this run.
        options: of this run.

    Raises:
        UserError: something differs that decides the numbers, and `--resume_changed` is not given.
    """
    if saved.identity is None:
        log.info("%s does not say which data and options it was saved with, so nothing of that is compared.", saved.folder)
        return
    if rounding := list(_rounding_changes(saved.identity, now, defaults(options))):
        log.warning("The run goes on with the same numbers up to rounding: %s.", "; ".join(rounding))
    if saved.identity["updates"] != now["updates"]:
        log.warning(
            "The run ends at step %d now; it would have ended at step %d when the state was saved. The learning rate, and a tag "
            "warm-up given as a fraction, follow the new length from here on.",
            now["updates"],
            saved.identity["updates"],
        )
    changes = list(_changes(saved.identity, now, defaults(options)))
    if not changes:
        return
    listed = "\n".join(f"- {change}" for change in changes)
    if not options.state.resume_changed:
        error = UserError(
            f"--resume: this is not the run that saved {saved.folder}:\n{listed}\n"
            "Use what it was saved with, or give --resume_changed to go on with what there is now."
        )
        error.is_found_by_all = True
        raise error
    log.warning("The run goes on with what changed since the state was saved:\n%s", listed)


def _changes(before: Identity, now: Identity, default: Mapping[str, Any]) -> Iterator[str]:
    yield from _option_changes(before["options"][DECIDES], now["options"][DECIDES], default)
    if before["seed"] != now["seed"]:
        yield f"--seed was {before['seed']} and is {now['seed']}"
    for name in sorted(before["models"].keys() | now["models"].keys()):
        old, new = before["models"].get(name), now["models"].get(name)
        if old != new:
            yield f"{name} was {_named(old)} and is {_named(new)}"
    yield from _data_changes(before["data"], now["data"])


def _rounding_changes(before: Identity, now: Identity, default: Mapping[str, Any]) -> Iterator[str]:
    yield from _option_changes(before["options"][ROUNDS], now["options"][ROUNDS], default)
    if before["processes"] != now["processes"]:
        yield f"the number of processes was {before['processes']} and is {now['processes']}"


def _option_changes(before: Mapping[str, Any], now: Mapping[str, Any], default: Mapping[str, Any]) -> Iterator[str]:
    for name, value in now.items():
        old = before.get(name, default[name])
        if old != value:
            yield f"--{name} was {_shown(old)} and is {_shown(value)}"


def _data_changes(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for place in [*before, *(each for each in now if each not in before)]:
        if place not in now or place not in before:
            yield f"{place} is {'new' if place in now else 'gone'}"
            continue
        old, new = before[place], now[place]
        changed = [key for key in new if old.get(key) != new[key]]
        for key in changed:
            if key not in DIGESTS:
                yield f"{key} of {place} was {_shown(old.get(key))} and is {_shown(new[key])}"
        if digests := [key for key in changed if key in DIGESTS]:
            yield f"{place} has other {', '.join(digests)}"


def _file_identity(path: Path) -> str:
    return f"{path.name} ({sampled_hash(path)})" if path.exists() else str(path)


def _named(value: str | None) -> str:
    return "not given" if value is None else value


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
