"""Where a run's numbers go: TensorBoard, Weights & Biases, or nowhere."""

import json
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from library.options.errors import UserError
from library.options.groups.logging import LoggingOptions

Scalars = Mapping[str, float]


class Tracker(Protocol):
    """Where scalars go."""

    def scalars(self, values: Scalars, step: int, fields: Mapping[str, int]) -> None:
        """Record values at an x position; `fields` names the positions for trackers that choose the x axis later."""

    def image(self, name: str, path: Path, caption: str) -> None:
        """Record a sample picture where the tracker shows pictures."""

    def close(self) -> None:
        """Write what is still in memory."""


@dataclass(frozen=True)
class TrackerSettings:
    """What a tracker is made from."""

    folder: Path | None
    """The run's folder; None where nothing is written to disk."""
    project: str
    run_name: str | None
    api_key: str | None
    arguments: Mapping[str, Any]
    """Further arguments from `--log_tracker_config`."""
    config: Mapping[str, Any] | None
    """The options to store with the run, None for none."""


class TensorBoardTracker:
    """Event files in `<run folder>/<project>`."""

    def __init__(self, settings: TrackerSettings) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--log_with tensorboard needs the tensorboard package: pip install tensorboard") from error
        if settings.folder is None:
            raise UserError("--log_with tensorboard needs --logging_dir: give the folder that the event files are written to.")
        self._writer = SummaryWriter(str(settings.folder / settings.project), **settings.arguments)
        if settings.config is not None:
            text = json.dumps(dict(settings.config), indent=2, default=str)
            self._writer.add_text("config", f"```json\n{text}\n```")

    def scalars(self, values: Scalars, step: int, fields: Mapping[str, int]) -> None:
        """Record values at `step`; TensorBoard needs no fields."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, path: Path, caption: str) -> None:
        """Leave pictures to the output folder, where they are written anyway."""

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbTracker:
    """A run on Weights & Biases, or on a server or in a folder that speaks its protocol."""

    def __init__(self, settings: TrackerSettings) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--log_with wandb needs the wandb package: pip install wandb") from error
        if settings.api_key:
            wandb.login(key=settings.api_key)
        if settings.folder is not None:
            settings.folder.mkdir(parents=True, exist_ok=True)
            os.environ["WANDB_DIR"] = str(settings.folder)
        arguments = {"project": settings.project, "config": settings.config} | dict(settings.arguments)
        if settings.run_name is not None:
            arguments["name"] = settings.run_name
        self._run = wandb.init(**arguments)
        self._picture = wandb.Image

    def scalars(self, values: Scalars, step: int, fields: Mapping[str, int]) -> None:
        """Record values with their positions as fields: epoch values would be dropped as out of order by step."""
        self._run.log({**values, **fields})

    def image(self, name: str, path: Path, caption: str) -> None:
        """Attach a picture to the next record; one that another machine drew may not be here."""
        if path.is_file():
            self._run.log({name: self._picture(str(path), caption=caption)}, commit=False)

    def close(self) -> None:
        """Finish the run; waits for its upload."""
        self._run.finish()


_TRACKERS: dict[str, Callable[[TrackerSettings], Tracker]] = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}


class RunLog:
    """All trackers of a run; none of them where logging is off or the process is not the main one."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = tuple(trackers)

    @classmethod
    def open(cls, options: LoggingOptions, project: str, config: Mapping[str, Any] | None, started_at: datetime) -> "RunLog":
        """Start the trackers that `--log_with` and `--logging_dir` ask for.

        Args:
            options: the logging options.
            project: the tracker name of the script (`network_train`), unless `--log_tracker_name` gives another.
            config: stored with the run; None for nothing.
            started_at: names the run's folder, `<log_prefix><YYYYmmddHHMMSS>`.

        Raises:
            UserError: a tracker's package or `--logging_dir` is missing, or the tracker file cannot be read.
        """
        folder = run_folder(options, started_at)
        arguments = tracker_arguments(options.log_tracker_config)

        def settings(kind: str) -> TrackerSettings:
            name = options.log_tracker_name or project
            return TrackerSettings(folder, name, options.wandb_run_name, options.wandb_api_key, arguments.get(kind, {}), config)

        return cls([_TRACKERS[kind](settings(kind)) for kind in tracker_kinds(options)])

    def step(self, values: Scalars, step: int, epoch: int, **fields: int) -> None:
        """Record the values of one micro-batch; x is the number of updates made (several points share it when accumulating).

        Args:
            values: by name.
            step: updates made.
            epoch: counted from 1.
            fields: further positions, for trackers that choose the x axis later.
        """
        for tracker in self._trackers:
            tracker.scalars(values, step, {"global_step": step, "epoch": epoch, **fields})

    def epoch(self, values: Scalars, epoch: int, step: int, **fields: int) -> None:
        """Record the values of one epoch; x is the 1-based epoch. Arguments as for `step`."""
        for tracker in self._trackers:
            tracker.scalars(values, epoch, {"epoch": epoch, "global_step": step, **fields})

    def sample(self, index: int, path: Path, prompt: str) -> None:
        """Record a sample picture as `sample_<index>` with its prompt."""
        for tracker in self._trackers:
            tracker.image(f"sample_{index}", path, prompt)

    def close(self) -> None:
        """Write everything out; the log takes nothing afterwards."""
        for tracker in self._trackers:
            tracker.close()
        self._trackers = ()


def tracker_kinds(options: LoggingOptions) -> list[str]:
    """Return the trackers in use: as `--log_with` says, else TensorBoard where there is a `--logging_dir`."""
    chosen = options.log_with or ("tensorboard" if options.logging_dir else None)
    if chosen == "all":
        return list(_TRACKERS)
    return [] if chosen is None else [chosen]


def run_folder(options: LoggingOptions, started_at: datetime) -> Path | None:
    """Return the folder of one run inside `--logging_dir`, or None where there is none."""
    if not options.logging_dir:
        return None
    return Path(options.logging_dir) / f"{options.log_prefix or ''}{started_at:%Y%m%d%H%M%S}"


def tracker_arguments(path: str | None) -> dict[str, dict[str, Any]]:
    """Read the tables of `--log_tracker_config`, by tracker.

    Raises:
        UserError: the file cannot be read, or has other tables.
    """
    if path is None:
        return {}
    try:
        with Path(path).open("rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise UserError(f"--log_tracker_config {path} cannot be read ({error.strerror}): check the path.") from error
    except ValueError as error:
        raise UserError(f"--log_tracker_config {path} is not valid TOML: {error}") from error
    wrong = [name for name, table in tables.items() if name not in _TRACKERS or not isinstance(table, dict)]
    if wrong:
        raise UserError(f"--log_tracker_config {path} has {wrong[0]!r}; only the tables {', '.join(_TRACKERS)} are used.")
    return tables
