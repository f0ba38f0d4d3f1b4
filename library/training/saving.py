"""Writes models and states when their time comes, and lets old ones go."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from library.files.atomic import make_folder
from library.options.errors import UserError
from library.training.outputs import SaveKind, SavePlan, remove_outputs
from library.training.position import Position
from library.training.state import Resumable, save_state
from library.training.trainable import Trainable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """Something that is complete on disk."""

    path: Path
    """A file, or a folder."""
    what: Literal["model", "state"]
    kind: SaveKind
    position: Position


@dataclass
class Saver:
    """The observer that saves. Every process calls it; only the main one writes.

    Args:
        plan: when, where and under which names.
        trainable: what is saved as the model.
        live: what a state is made of.
        dtype: of the saved model; None keeps the one it is trained in.
        metadata: (file stem, place) to the metadata of a model saved there.
        averaged: enters the evaluation mode of optimizers that train other weights than they want saved.
        writes: whether this is the process that writes.
        seed, batches_per_epoch, identity: recorded in states.
        losses: the loss recorder's own state, recorded in states.
        after_save: called, in the process that writes, with everything that is complete on disk.
    """

    plan: SavePlan
    trainable: Trainable
    live: Resumable
    dtype: torch.dtype | None
    metadata: Callable[[str, Position], dict[str, str]]
    averaged: Callable[[], AbstractContextManager[None]]
    writes: bool
    seed: int
    batches_per_epoch: int
    identity: Mapping[str, Any] | None = None
    losses: Callable[[], dict[str, Any]] = dict
    after_save: list[Callable[[Saved], None]] = field(default_factory=list)

    def before_training(self, position: Position) -> None:
        """Nothing is saved before training."""

    def after_update(self, position: Position) -> None:
        """Save where the plan has a save at this step."""
        if self.plan.should_save_step(position.update):
            self._save_or_go_on("step", position.update, position)

    def after_epoch(self, position: Position) -> None:
        """Save where the plan has a save at this epoch; the state continues with the next one."""
        if self.plan.should_save_epoch(position.epoch):
            self._save_or_go_on("epoch", position.epoch, position)

    def after_training(self, position: Position) -> None:
        """Save the final model."""
        self._save("final", 0, position)

    def save_interrupted(self, position: Position) -> Path:
        """Save model and state where a run was stopped, and return the state's folder.

        The state goes first: switching an optimizer to its averaged weights and back rounds them, and the state must continue
        from weights that were not rounded.
        """
        state = self.plan.state_path("step", position.update)
        if self.writes:
            self._write_state(state, "step", position)
            self._write_model(self.plan.model_path("step", position.update), "step", position)
        return state

    def _save_or_go_on(self, kind: SaveKind, number: int, position: Position) -> None:
        """Save in mid-run; a disk that is full now may have room at the next save, and nothing that was learned is lost."""
        try:
            self._save(kind, number, position)
        except UserError as error:
            log.error("%s Training goes on; nothing was removed, and the next save is tried as planned.", error)

    def _save(self, kind: SaveKind, number: int, position: Position) -> None:
        if not self.writes:
            return
        self._write_model(self.plan.model_path(kind, number), kind, position)
        if self.plan.should_save_state(kind):
            self._write_state(self.plan.state_path(kind, number), kind, position.next_epoch() if kind == "epoch" else position)
            remove_outputs([self.plan.outdated_state(kind, number)], self.plan.folder)
        remove_outputs([self.plan.outdated_model(kind, number)], self.plan.folder)

    def _write_model(self, path: Path, kind: SaveKind, position: Position) -> None:
        make_folder(path.parent)
        with self.averaged(), self.trainable.evaluation():
            self.trainable.save(path, self.dtype, self.metadata(path.stem, position), position)
        log.info("Saved %s", path)
        self._tell(Saved(path, "model", kind, position))

    def _write_state(self, folder: Path, kind: SaveKind, position: Position) -> None:
        save_state(folder, self.live, position, self.seed, self.batches_per_epoch, self.losses(), self.identity)
        log.info("Saved the state %s", folder)
        self._tell(Saved(folder, "state", kind, position))

    def _tell(self, saved: Saved) -> None:
        for told in self.after_save:
            told(saved)
