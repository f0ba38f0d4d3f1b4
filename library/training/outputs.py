"""What a run writes and when: how long it is, which steps and epochs are saved, how files are named, which old ones go.

Everything here is decided before the loop and is free of torch; the loop only asks `SavePlan`.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.files.atomic import make_folder
from library.options.errors import UserError, problems_of
from library.options.groups.output import SavingOptions
from library.options.groups.state import StateOptions

logger = logging.getLogger(__name__)

SaveKind = Literal["epoch", "step", "final"]
"""What a save belongs to: the end of an epoch, an optimizer update, or the end of the run."""

_UNNAMED: dict[SaveKind, str] = {"epoch": "epoch", "step": "at", "final": "last"}
_NUMBERS: dict[SaveKind, str] = {"epoch": "-{:06d}", "step": "-step{:08d}", "final": ""}
_NUMBER_PATTERNS: dict[SaveKind, str] = {"epoch": r"-\d{6,}", "step": r"-step\d{8,}", "final": ""}

_OF_MODEL_FOLDERS = ("model_index.json",)
"""What every diffusers folder of a whole model has."""
_OF_STATE_FOLDERS = ("train_state.json", "optimizer.bin")
"""Either is in a state folder, ours or an older one of sd-scripts."""


def save_stem(kind: SaveKind, number: int, output_name: str | None) -> str:
    """Return the name, without extension, of what is saved at an epoch, at a step or at the end.

    Args:
        kind: what the save belongs to.
        number: the 1-based epoch, or the number of updates made; ignored for "final".
        output_name: `--output_name`; without it the names begin with `epoch`, `at` and `last`.
    """
    return (output_name or _UNNAMED[kind]) + _NUMBERS[kind].format(number)


def checkpoint_name(kind: SaveKind, number: int, output_name: str | None, extension: str) -> str:
    """Return the file name of a model: `my-000003.safetensors`, `my-step00000100.safetensors`, `my.safetensors`.

    Args:
        kind: what the save belongs to.
        number: the 1-based epoch, or the number of updates made; ignored for "final".
        output_name: `--output_name`, or None.
        extension: with its dot; "" for a model saved as a folder.
    """
    return save_stem(kind, number, output_name) + extension


def state_name(kind: SaveKind, number: int, output_name: str | None) -> str:
    """Return the folder name of a state: `my-000003-state`, `my-step00000100-state`, `my-state`."""
    return save_stem(kind, number, output_name) + "-state"


@dataclass(frozen=True)
class RunLength:
    """How long a run is. An update is one step of the optimizer, made of up to `accumulation` batches of every process."""

    updates_per_epoch: int
    total_updates: int
    num_epochs: int
    """Epochs begun; the last one is cut short where `total_updates` is not a multiple of `updates_per_epoch`."""

    @classmethod
    def of(cls, batches_per_epoch: int, accumulation: int, max_train_steps: int, max_train_epochs: int | None) -> "RunLength":
        """Work out the length of a run.

        Args:
            batches_per_epoch: batches that one process sees in an epoch, at least 1.
            accumulation: batches per update; the last update of an epoch takes what is left.
            max_train_steps: updates to make, where no number of epochs is given.
            max_train_epochs: epochs to train; replaces `max_train_steps`.
        """
        updates_per_epoch = _ceil_div(batches_per_epoch, accumulation)
        total = max_train_steps if max_train_epochs is None else max_train_epochs * updates_per_epoch
        return cls(updates_per_epoch, total, _ceil_div(total, updates_per_epoch))

    def epochs_finished(self, updates: int) -> int:
        """Return how many whole epochs are behind after `updates` updates; the run's last epoch counts once the run is over."""
        return self.num_epochs if updates >= self.total_updates else updates // self.updates_per_epoch


def epoch_interval(save_every_n_epochs: int | None, save_n_epoch_ratio: int | None, num_epochs: int) -> int | None:
    """Return after how many epochs a model is saved, or None for never.

    A ratio above 0 asks for about that many saves in the whole run and wins over the interval.
    """
    if save_n_epoch_ratio is not None and save_n_epoch_ratio > 0:
        return max(1, num_epochs // save_n_epoch_ratio)
    return save_every_n_epochs or None


def outdated_epoch(epoch: int, every: int, keep: int | None) -> int | None:
    """Return the epoch whose file goes when `epoch` was saved and the newest `keep` are to stay; None if there is none."""
    if not keep:
        return None
    old = epoch - every * keep
    return old if old >= 0 else None


def outdated_step(step: int, every: int, keep: int | None) -> int | None:
    """Return the step whose file goes when `step` was saved and those of the last `keep` *updates* are to stay.

    With a file every 10 updates and 30 kept, saving step 50 removes step 10, so that 20, 30, 40 and 50 remain.
    """
    if not keep:
        return None
    old = step - keep - 1
    return old - old % every if old >= 0 else None


@dataclass(frozen=True)
class SavePlan:
    """When a run saves, under which names, and what it removes; built once, before the loop."""

    folder: Path
    output_name: str | None
    extension: str
    every_n_epochs: int | None
    every_n_steps: int | None
    keep_epochs: int | None
    keep_steps: int | None
    keep_state_epochs: int | None
    keep_state_steps: int | None
    saves_states: bool
    """A state goes with every save."""
    saves_final_state: bool
    last_epoch: int

    @classmethod
    def of(cls, output: SavingOptions, state: StateOptions, extension: str, num_epochs: int) -> "SavePlan":
        """Decide everything about saving from the options.

        Args:
            output: names, intervals and how many files to keep.
            state: whether training states are saved too.
            extension: of model files, with its dot; "" for models saved as folders.
            num_epochs: the run's number of epochs.

        Raises:
            UserError: there is no `--output_dir`.
        """
        if not output.output_dir:
            raise UserError("There is no --output_dir: give the folder that the trained files are written to.")
        return cls(
            folder=Path(output.output_dir),
            output_name=output.output_name or None,
            extension=extension,
            every_n_epochs=epoch_interval(output.save_every_n_epochs, output.save_n_epoch_ratio, num_epochs),
            every_n_steps=output.save_every_n_steps or None,
            keep_epochs=output.save_last_n_epochs,
            keep_steps=output.save_last_n_steps,
            keep_state_epochs=output.save_last_n_epochs_state or output.save_last_n_epochs,
            keep_state_steps=output.save_last_n_steps_state or output.save_last_n_steps,
            saves_states=state.save_state,
            saves_final_state=state.save_state or state.save_state_on_train_end,
            last_epoch=num_epochs,
        )

    def should_save_epoch(self, epoch: int) -> bool:
        """Tell whether the model is saved after `epoch` (1-based); the last epoch's model is the final one."""
        return self.every_n_epochs is not None and epoch % self.every_n_epochs == 0 and epoch < self.last_epoch

    def should_save_step(self, step: int) -> bool:
        """Tell whether the model is saved after `step` updates."""
        return self.every_n_steps is not None and step > 0 and step % self.every_n_steps == 0

    def should_save_state(self, kind: SaveKind) -> bool:
        """Tell whether a state goes with a model saved at this occasion."""
        return self.saves_final_state if kind == "final" else self.saves_states

    def model_path(self, kind: SaveKind, number: int = 0) -> Path:
        """Return where the model of an epoch (1-based), a step or the end is written."""
        return self.folder / checkpoint_name(kind, number, self.output_name, self.extension)

    def variant_path(self, model: Path, suffix: str) -> Path:
        """Return where another version of a model goes: beside it, the suffix at the end of its name."""
        return model.with_name(model.name.removesuffix(self.extension) + suffix + self.extension)

    def state_path(self, kind: SaveKind, number: int = 0) -> Path:
        """Return the folder that the state of an epoch (1-based), a step or the end is written to."""
        return self.folder / state_name(kind, number, self.output_name)

    def outdated_model(self, kind: SaveKind, number: int) -> Path | None:
        """Return the model that goes now that `number` was saved, whether or not it exists."""
        old = self._outdated(kind, number, self.keep_epochs, self.keep_steps)
        return None if old is None else self.model_path(kind, old)

    def outdated_state(self, kind: SaveKind, number: int) -> Path | None:
        """Return the state folder that goes now that `number` was saved, whether or not it exists."""
        old = self._outdated(kind, number, self.keep_state_epochs, self.keep_state_steps)
        return None if old is None else self.state_path(kind, old)

    def _outdated(self, kind: SaveKind, number: int, keep_epochs: int | None, keep_steps: int | None) -> int | None:
        if kind == "epoch" and self.every_n_epochs is not None:
            return outdated_epoch(number, self.every_n_epochs, keep_epochs)
        if kind == "step" and self.every_n_steps is not None:
            return outdated_step(number, self.every_n_steps, keep_steps)
        return None


def remove_outputs(paths: Iterable[Path | None], folder: Path) -> None:
    """Remove old models and states; what is already gone, or cannot be removed, does not stop a run.

    Args:
        paths: files and folders directly inside `folder`; None entries are skipped.
        folder: the output folder.

    Raises:
        ValueError: a path lies elsewhere, which would be a defect of ours.
    """
    for path in paths:
        if path is None:
            continue
        if path.parent != folder:
            raise ValueError(f"{path} is not directly inside {folder} and is not removed.")
        try:
            _remove(path)
        except OSError as error:
            logger.warning("The old file %s could not be removed: %s", path, error)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        return
    logger.info("Removed the old %s", path)


def output_problems(output: SavingOptions) -> list[str]:
    """Say what would keep a run from saving, one sentence each; asked before anything is loaded.

    The folder itself is made when training begins.
    """
    problems = []
    name = output.output_name
    if name and not output.is_plain(name):
        problems.append(
            f"--output_name is {name!r}, which is not a plain file name: give the name without folders or extension, "
            "and the folder as --output_dir."
        )
    if not output.output_dir:
        problems.append("--output_dir is missing: give the folder that the trained files are written to.")
        return problems
    folder = Path(output.output_dir)
    problems += folder_problems("--output_dir", folder)
    return problems + list(_blocked_names(folder, output.output_name or None, output.extension))


def folder_problems(option: str, folder: Path) -> list[str]:
    """Say what keeps a folder from being made or written to; to know, something is made in the nearest one there is, and removed.

    Args:
        option: that names the folder.
        folder: which need not exist.
    """
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not above.is_dir():
        return [f"{option} {folder} cannot be made, because {above} is a file."]
    return [f"{option} {folder} cannot be written to. {problem}" for problem in problems_of(lambda: make_folder(above))]


def file_problems(option: str, path: Path) -> list[str]:
    """Say what keeps a file from being made or continued.

    Args:
        option: that names the file.
        path: of the file, which need not exist.
    """
    return [f"{option} {path} is a folder; name a file."] if path.is_dir() else folder_problems(option, path.parent)


def _blocked_names(folder: Path, output_name: str | None, extension: str) -> Iterator[str]:
    """Yield a sentence for each thing that stands where the run may write, and is none of what a run writes there."""
    occasions: tuple[SaveKind, ...] = ("epoch", "step", "final")
    stems = "|".join(f"{re.escape(output_name or _UNNAMED[kind])}{_NUMBER_PATTERNS[kind]}" for kind in occasions)
    for path in sorted(folder.iterdir()) if os.path.isdir(folder) and os.access(folder, os.R_OK) else ():
        if re.fullmatch(f"(?:{stems})-state", path.name):
            what = _in_the_way(path, "", _OF_STATE_FOLDERS)
        elif re.fullmatch(f"(?:{stems})(?:-ema)?{re.escape(extension)}", path.name):
            what = _in_the_way(path, extension, _OF_MODEL_FOLDERS)
        else:
            continue
        if what:
            yield f"{path} is {what}, and the run would write there. Move it away, or choose another --output_name."


def _in_the_way(path: Path, extension: str, signs: Sequence[str]) -> str | None:
    if extension:
        return "a folder" if path.is_dir() else None
    if not path.is_dir():
        return "a file"
    return f"a folder of something else (it has no {signs[0]})" if is_foreign_folder(path, signs) else None


def is_foreign_folder(path: Path, signs: Sequence[str] = _OF_MODEL_FOLDERS) -> bool:
    """Tell whether a folder holds something, but nothing that marks a model folder, so that replacing it would lose other things.

    Args:
        path: of a folder.
        signs: names of files, one of which the folder should have.
    """
    return any(path.iterdir()) and not any((path / name).exists() for name in signs)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
