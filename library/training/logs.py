"""What a person sees of a run: trackers, the progress bar, the running loss and the lines at the start.

The loop never waits for a number: losses are copied off the device in the background (`AsyncScalars`) and shown when they arrive.
"""

import json
import logging
import os
import sys
import tomllib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from library.options.errors import UserError
from library.options.groups.logging import LoggingOptions

logger = logging.getLogger(__name__)

Scalars = Mapping[str, float]


class Tracker(Protocol):
    """Where scalars go."""

    def scalars(self, values: Scalars, step: int, fields: Mapping[str, int]) -> None:
        """Record values at an x position; `fields` names the positions for trackers that choose the x axis later."""

    def image(self, name: str, image: Any, caption: str) -> None:
        """Record a sample picture (PIL) where the tracker shows pictures."""

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

    def image(self, name: str, image: Any, caption: str) -> None:
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
        arguments = {"project": settings.project, "name": settings.run_name, "config": settings.config} | dict(settings.arguments)
        self._run = wandb.init(**arguments)
        self._picture = wandb.Image

    def scalars(self, values: Scalars, step: int, fields: Mapping[str, int]) -> None:
        """Record values with their positions as fields: epoch values would be dropped as out of order by step."""
        self._run.log({**values, **fields})

    def image(self, name: str, image: Any, caption: str) -> None:
        """Attach a picture to the next record."""
        self._run.log({name: self._picture(image, caption=caption)}, commit=False)

    def close(self) -> None:
        """Finish the run; waits for its upload."""
        self._run.finish()


_TRACKERS: dict[str, Callable[[TrackerSettings], Tracker]] = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}

PRIVATE_OPTIONS = frozenset({
    "wandb_api_key", "huggingface_token",
    "pretrained_model_name_or_path", "vae", "tokenizer_cache_dir", "train_data_dir", "conditioning_data_dir", "reg_data_dir",
    "output_dir", "logging_dir",
    "in_json", "dataset_config", "config_file", "output_config", "resume", "sample_prompts", "network_weights", "base_weights",
    "log_tracker_config", "console_log_file", "metadata_thumbnail",
})  # fmt: skip
"""Options that `--log_config` leaves out: secrets, and paths, which tell of a person's machine."""


def loggable_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options to store with a tracker: no secret, no path; lists and tables as text.

    Args:
        values: every option of the script by its name.
    """
    plain = (bool, int, float, str, type(None))
    return {
        name: value if isinstance(value, plain) else str(value) for name, value in values.items() if name not in PRIVATE_OPTIONS
    }


class RunLog:
    """All trackers of a run; none of them where logging is off or the process is not the main one."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = tuple(trackers)

    @classmethod
    def open(cls, options: LoggingOptions, project: str, values: Mapping[str, Any], started_at: datetime) -> "RunLog":
        """Start the trackers that `--log_with` and `--logging_dir` ask for.

        Args:
            options: the logging options.
            project: the tracker name of the script (`network_train`), unless `--log_tracker_name` gives another.
            values: every option of the script by its name, stored where `--log_config` is set.
            started_at: names the run's folder, `<log_prefix><YYYYmmddHHMMSS>`.

        Raises:
            UserError: a tracker's package or `--logging_dir` is missing, or the tracker file cannot be read.
        """
        folder = run_folder(options, started_at)
        arguments = _tracker_arguments(options.log_tracker_config)
        config = loggable_config(values) if options.log_config else None

        def settings(kind: str) -> TrackerSettings:
            name = options.log_tracker_name or project
            return TrackerSettings(folder, name, options.wandb_run_name, options.wandb_api_key, arguments.get(kind, {}), config)

        return cls([_TRACKERS[kind](settings(kind)) for kind in tracker_kinds(options)])

    def step(self, values: Scalars, step: int, epoch: int) -> None:
        """Record the values of one micro-batch; x is the number of updates made (several points share it when accumulating)."""
        for tracker in self._trackers:
            tracker.scalars(values, step, {"global_step": step, "epoch": epoch})

    def epoch(self, values: Scalars, epoch: int, step: int) -> None:
        """Record the values of one epoch; x is the 1-based epoch."""
        for tracker in self._trackers:
            tracker.scalars(values, epoch, {"epoch": epoch, "global_step": step})

    def sample(self, index: int, image: Any, prompt: str) -> None:
        """Record a sample picture as `sample_<index>` with its prompt."""
        for tracker in self._trackers:
            tracker.image(f"sample_{index}", image, prompt)

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


def _tracker_arguments(path: str | None) -> dict[str, dict[str, Any]]:
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


class AsyncScalars:
    """Numbers on their way from the device: `push` never waits, `ready` gives those that have arrived, in order.

    On the CPU a number arrives at once. On CUDA it is copied to pinned memory behind the kernels already queued, and an event
    tells when it is there. Other devices are read directly, which waits for them.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Any, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, tag: Any, value: Tensor) -> None:
        """Send a number off.

        Args:
            tag: comes back with the number.
            value: () on any device; it may be overwritten later on the same stream.
        """
        value = value.detach()
        if value.is_cuda:
            landing = torch.empty((), dtype=value.dtype, pin_memory=True)
            landing.copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(value.device))
            self._pending.append((tag, landing, event))
        else:
            self._pending.append((tag, value.to("cpu", copy=True), None))

    def ready(self) -> Iterator[tuple[Any, float]]:
        """Yield tag and number of everything that has arrived, oldest first, without waiting."""
        while self._pending and (self._pending[0][2] is None or self._pending[0][2].query()):
            tag, value, _ = self._pending.popleft()
            yield tag, float(value)

    def drain(self) -> Iterator[tuple[Any, float]]:
        """Yield everything sent off, waiting for what is still on its way."""
        while self._pending:
            tag, value, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            yield tag, float(value)


class LossRecorder:
    """The average loss over a sliding window one epoch long.

    In the first epoch values are appended; in later ones each replaces the value that the same batch position had an epoch ago.
    Positions that were never seen, after a start in mid-epoch, do not count.
    """

    def __init__(self) -> None:
        self._losses: list[float | None] = []
        self._total = 0.0
        self._count = 0

    def add(self, epoch: int, index: int, loss: float) -> None:
        """Take the loss of a batch.

        Args:
            epoch: 1-based.
            index: 0-based position of the batch in its epoch.
            loss: mean over the batch.
        """
        if epoch == 1:
            self._losses.append(None)
            index = len(self._losses) - 1
        elif index >= len(self._losses):
            self._losses.extend([None] * (index + 1 - len(self._losses)))
        old = self._losses[index]
        self._losses[index] = loss
        self._total += loss - (old or 0.0)
        self._count += old is None

    @property
    def average(self) -> float:
        """The average of the window; NaN before the first loss."""
        return self._total / self._count if self._count else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """Return the window for a saved state, so that a resumed run shows the same average."""
        return {"losses": list(self._losses), "total": self._total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the window of a saved state."""
        self._losses = list(state["losses"])
        self._total = float(state["total"])
        self._count = sum(loss is not None for loss in self._losses)


@dataclass(frozen=True)
class NormStats:
    """What limiting the norms of a network's modules did (`--scale_weight_norms`)."""

    keys_scaled: int
    average_key_norm: float
    max_key_norm: float


def step_scalars(current: float, average: float, rates: Scalars, norms: NormStats | None = None) -> dict[str, float]:
    """Name the values of one micro-batch of network training.

    Args:
        current: the batch's loss.
        average: the running loss.
        rates: see `learning_rate_scalars`.
        norms: of the network's modules, where they are limited.
    """
    values = {"loss/current": current, "loss/average": average, **rates}
    if norms is not None:
        values["max_norm/keys_scaled"] = norms.keys_scaled
        values["max_norm/max_key_norm"] = norms.max_key_norm
        values["norm/avg_key_norm"] = norms.average_key_norm
    return values


def learning_rate_scalars(groups: Sequence[Mapping[str, Any]], descriptions: Sequence[str | None]) -> dict[str, float]:
    """Name the learning rates of an optimizer's groups, one series per group.

    Args:
        groups: the optimizer's parameter groups. Optimizers that find their own rate keep a factor `d` there, which multiplies it.
        descriptions: what each group trains, such as "unet"; groups beyond the list, or described by None, go by number.
    """
    values: dict[str, float] = {}
    for index, group in enumerate(groups):
        described = descriptions[index] if index < len(descriptions) else None
        name = described or f"group{index}"
        values[f"lr/{name}"] = float(group["lr"])
        if "d" in group:
            values[f"lr/d*lr/{name}"] = float(group["d"]) * float(group["lr"])
    return values


class Progress:
    """The progress bar: updates made, time left, updates per second, running loss and learning rate; on the main process only."""

    def __init__(self, total: int, initial: int, visible: bool) -> None:
        # A file or pipe keeps every redrawn line: redraw it rarely there.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=total, initial=initial, desc="steps", disable=not visible, mininterval=interval, maxinterval=interval * 10
        )

    def advance(self) -> None:
        """Count one update."""
        self._bar.update(1)

    def show(self, average: float, rate: float, norms: NormStats | None = None) -> None:
        """Set what stands behind the bar; it is drawn with the next update.

        Args:
            average: the running loss.
            rate: learning rate of the first group.
            norms: of the network's modules, where they are limited.
        """
        shown: dict[str, Any] = {"avr_loss": f"{average:.4g}", "lr": f"{rate:.3g}"}
        if norms is not None:
            shown |= {"Keys Scaled": norms.keys_scaled, "Average key norm": f"{norms.average_key_norm:.4g}"}
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Draw the bar a last time and leave it standing."""
        self._bar.close()


@dataclass(frozen=True)
class RunSummary:
    """The figures a person wants to check before waiting for hours."""

    num_train_images: int
    """Images times repeats."""
    num_reg_images: int
    num_validation_images: int
    batches_per_epoch: int
    """Of one process."""
    num_epochs: int
    batch_sizes: Sequence[int]
    num_processes: int
    accumulation: int
    total_updates: int
    loss_terms: Sequence[str]

    def lines(self) -> list[str]:
        """Return the lines printed when training starts."""
        sizes = ", ".join(str(size) for size in sorted(set(self.batch_sizes)))
        return [
            f"  training images × repeats: {self.num_train_images}",
            f"  regularisation images: {self.num_reg_images}",
            f"  validation images: {self.num_validation_images}",
            f"  batches per epoch: {self.batches_per_epoch}",
            f"  epochs: {self.num_epochs}",
            f"  batch size: {sizes}; processes: {self.num_processes}; gradient accumulation: {self.accumulation}",
            f"  total optimizer steps: {self.total_updates}",
            f"  loss: {' → '.join(self.loss_terms)}",
        ]
