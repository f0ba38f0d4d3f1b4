"""Everything a run needs to go on exactly where it stood, in one folder.

| file | content |
|---|---|
| `model.safetensors` | the trained parameters, in the dtype they are trained in |
| `optimizer.bin`, `scheduler.bin`, `scaler.pt` | their state dicts (`scaler.pt` with mixed precision fp16 only) |
| `extras/NAME.safetensors` | further tensors that training needs, such as a running average of the weights |
| `train_state.json` | `current_epoch` and `current_step` as sd-scripts writes them, and what an exact continuation needs besides |

No random state is stored: every draw of training is a function of the seed and the place in the run, both of which are here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.files.atomic import atomic_folder
from library.files.safetensors_io import open_safetensors, save_safetensors
from library.optim.own_settings import OwnSettings
from library.optim.parameter_steps import load_optimizer_state, move_state
from library.options.errors import UserError
from library.training.full_tensors import (
    Gathered,
    full_optimizer_state,
    full_shapes,
    full_tensors,
    load_full_tensors,
    shares_of_optimizer_state,
)
from library.training.position import Position
from library.training.state_files import check_files, check_present, load_part, refuse_damaged, sizes_of_files

TRAIN_STATE = "train_state.json"

_IDENTITY = frozenset({"options", "seed", "models", "data", "processes", "updates"})
"""What a state that knows its run says of it; see `library.training.identity`."""

_NOT_IN_EVERY_VERSION = frozenset(
    {"initial_lr", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay", "d_denom", "d_hat"}
)
"""Settings of parameter groups that come with a version of PyTorch, a schedule or a first step, and so tell no optimizers apart."""


@dataclass(frozen=True)
class SavedPlace:
    """What `train_state.json` says."""

    folder: Path
    """Where the state lies on this machine."""
    position: Position | None
    """None for a state of sd-scripts, which does not say where in the epoch it stands."""
    epoch: int
    update: int
    seed: int | None = None
    batches_per_epoch: int | None = None
    losses: dict[str, Any] = field(default_factory=dict)
    """The running average of the loss, as its recorder wants it back."""
    identity: dict[str, Any] | None = None
    """Of the run that saved it, see `library.training.identity`; None where the state does not say."""


class StatefulTensors(Protocol):
    """Further tensors of a run that belong in its states."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the tensors by name, on any device."""

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> Any:
        """Take up tensors of the same names and shapes, which are on the CPU."""

    def go_back(self, position: Position) -> None:
        """Forget what was taken in after a place, where the trained weights are still those of that place."""


@dataclass
class Resumable:
    """The live objects whose state is saved and restored."""

    module: nn.Module
    optimizer: Any
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: Any | None
    extras: dict[str, StatefulTensors] = field(default_factory=dict)
    """Further tensors by the name of their file."""
    state_on: torch.device | None = None
    """Where the optimizer's state belongs, if not where its parameters are between steps."""


def save_state(
    folder: Path,
    live: Resumable,
    position: Position,
    seed: int,
    batches_per_epoch: int,
    losses: Mapping[str, Any],
    identity: Mapping[str, Any] | None = None,
    gathered: Gathered | None = None,
) -> None:
    """Write a state folder; the folder appears under its name only when all of it is on disk.

    Args:
        folder: its name.
        live: what is saved.
        position: where the run stands.
        seed: see `SavedPlace`, as the following ones.
        batches_per_epoch: of the run.
        losses: of the run.
        identity: of the run.
        gathered: module and optimizer where they are divided over processes.

    Raises:
        UserError: if it cannot be written; a folder of that name that was there before is still whole then.
    """
    place = {
        "current_epoch": position.epoch,
        "current_step": position.update,
        "current_batch": position.batch,
        "seed": seed,
        "batches_per_epoch": batches_per_epoch,
        "losses": dict(losses),
        "optimizer": class_path(live.optimizer),
    } | ({} if identity is None else {"identity": dict(identity)})
    gathered = gathered or Gathered()
    tensors = {name: tensor.contiguous() for name, tensor in full_tensors(live.module, gathered)}
    optimizer_state = full_optimizer_state(live.optimizer, gathered)
    try:
        with atomic_folder(folder) as unfinished:
            save_safetensors(unfinished / "model.safetensors", tensors, {"format": "pt"})
            for name, extra in live.extras.items():
                contiguous = {key: tensor.contiguous() for key, tensor in extra.state_dict().items()}
                save_safetensors(unfinished / _extra_file(name), contiguous, {"format": "pt"})
            torch.save(optimizer_state, unfinished / "optimizer.bin")
            torch.save(live.schedule.state_dict(), unfinished / "scheduler.bin")
            if live.scaler is not None:
                torch.save(live.scaler.state_dict(), unfinished / "scaler.pt")
            place["files"] = sizes_of_files(unfinished)
            (unfinished / TRAIN_STATE).write_text(json.dumps(place), encoding="utf-8")
    except (OSError, RuntimeError, UserError) as error:  # torch.save reports a full disk as RuntimeError
        reason = error.__cause__ if isinstance(error, UserError) else error
        raise UserError(f"The training state {folder} could not be written: {reason}. Free some space there.") from error


def read_place(folder: Path) -> SavedPlace:
    """Read where a saved run stood, before anything heavy is loaded.

    Raises:
        UserError: if the folder is missing or is not a training state.
    """
    if not folder.is_dir():
        raise UserError(
            f"--resume: there is no folder {folder}. Give a folder that --save_state wrote, such as NAME-step00000100-state."
        )
    check_present(folder, [TRAIN_STATE])
    try:
        saved = json.loads((folder / TRAIN_STATE).read_text(encoding="utf-8"))
        place = _place(folder, saved)
        sizes = {str(name): int(size) for name, size in saved["files"].items()} if "files" in saved else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        refuse_damaged(folder / TRAIN_STATE, f"it cannot be read ({error!r})")
    check_files(folder, sizes)
    return place


def _place(folder: Path, saved: Mapping[str, Any]) -> SavedPlace:
    epoch, update = int(saved["current_epoch"]), int(saved["current_step"])
    if "current_batch" not in saved:
        return SavedPlace(folder, position=None, epoch=epoch, update=update)
    position = Position(epoch=epoch, batch=int(saved["current_batch"]), update=update)
    seed, batches = int(saved["seed"]), int(saved["batches_per_epoch"])
    if not 0 <= position.batch <= batches:
        raise ValueError(f"batch {position.batch} of {batches}")
    identity = saved.get("identity")
    if identity is not None and (missing := _IDENTITY - identity.keys()):
        raise KeyError(min(missing))
    return SavedPlace(folder, position, epoch, update, seed, batches, dict(saved.get("losses", {})), identity)


def load_state(folder: Path, live: Resumable) -> None:
    """Restore parameters, optimizer, schedule, gradient scaler and the extras from a state folder.

    Rates and what else the options say of optimizer and schedule stay as they are; the state tells what training made of them.

    Raises:
        UserError: if the state belongs to another network, optimizer or schedule, or lacks an extra.
    """
    weights = _fitting(folder, "model.safetensors", full_shapes(live.module))
    extras = {}
    for name, extra in live.extras.items():
        shapes = {key: tensor.shape for key, tensor in extra.state_dict().items()}
        extras[name] = _fitting(folder, _extra_file(name), shapes)
    _check_optimizer(folder, live.optimizer)
    load_full_tensors(weights, live.module)
    for name, extra in live.extras.items():
        extra.load_state_dict(extras[name])
    settings = OwnSettings.of(live.optimizer, live.schedule)
    parts = [("optimizer.bin", live.optimizer), ("scheduler.bin", live.schedule)]
    if live.scaler is not None and (folder / "scaler.pt").is_file():
        parts.append(("scaler.pt", live.scaler))
    for name, part in parts:
        saved = load_part(folder / name)
        try:
            if part is live.optimizer:
                _check_settings(part, saved)
                load_optimizer_state(part, shares_of_optimizer_state(saved, part))
                if live.state_on is not None:
                    move_state(part, live.state_on)
            else:
                part.load_state_dict(saved)
        except (ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"--resume: {folder / name} does not fit this run ({error}). Use the same --optimizer_type and --lr_scheduler "
                "as the run that saved it."
            ) from error
    settings.put_back(live.optimizer, live.schedule)


def _extra_file(name: str) -> str:
    return f"extras/{name}.safetensors"


def _fitting(folder: Path, name: str, own: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Open a file of a state whose tensors must have the names and shapes of those that live now.

    Raises:
        UserError: they have not, or there is no such file.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(
            f"--resume: {folder} has no {name}, which this run needs: it was saved with other options. Use those of the run that "
            "saved it."
        )
    saved = open_safetensors(path)
    if differing := sorted(set(own) ^ set(saved))[:3] or [k for k in own if own[k] != saved.infos[k].shape][:3]:
        raise UserError(
            f"--resume: {path} was saved while something else was trained: {', '.join(differing)} do not fit. Use the options of "
            "the run that saved it: the same model and trained parts, for networks the same --network_dim and --network_args."
        )
    return {key: saved[key] for key in own}


def class_path(optimizer: Any) -> str:
    """Return `package.module.Class` of an optimizer, wrapped by accelerate or not."""
    cls = type(getattr(optimizer, "optimizer", optimizer))
    return f"{cls.__module__}.{cls.__qualname__}"


def _check_optimizer(folder: Path, optimizer: Any) -> None:
    saved = json.loads((folder / TRAIN_STATE).read_text(encoding="utf-8")).get("optimizer")
    if saved is not None and saved != class_path(optimizer):
        raise UserError(
            f"--resume: {folder} was saved with the optimizer {saved}, and this run has {class_path(optimizer)}, to which its "
            "averages mean nothing. Use the --optimizer_type of the run that saved it."
        )


def _check_settings(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Refuse the state of another optimizer where only the names of its settings tell, as in states of sd-scripts.

    Raises:
        ValueError: naming settings that one has and the other has not.
    """
    groups = (saved["param_groups"], optimizer.param_groups)
    theirs, ours = ({key for group in each for key in group} - _NOT_IN_EVERY_VERSION for each in groups)
    if differing := sorted(theirs ^ ours):
        raise ValueError(f"only one of the two optimizers has {', '.join(differing)}")
