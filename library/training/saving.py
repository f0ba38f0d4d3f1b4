"""Writes models and states when their time comes, and lets old ones go."""

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from library.files.atomic import make_folder
from library.options.errors import UserError
from library.training.full_tensors import Gathered, gather
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


@dataclass(frozen=True)
class _Occasion:
    """Why and where in the run something is saved, and what is saved where that is divided over processes."""

    kind: SaveKind
    position: Position
    gathered: Gathered


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
        fallbacks: folders that take the last files where the run's own does not.
        variants: by suffix of the name, what enters other weights, given the saved type, that are saved beside each model.
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
    variants: dict[str, Callable[[torch.dtype | None], AbstractContextManager[None]]] = field(default_factory=dict)
    fallbacks: list[Path] = field(default_factory=lambda: fallback_folders())

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
        """Save the final model, in another folder where the run's own takes no files.

        Raises:
            UserError: it is in another folder, or could be saved nowhere.
        """
        with_state = self.plan.should_save_state("final")
        occasion = self._occasion("final", position, with_state=with_state)
        displaced = self._write_final(occasion, with_state) if self.writes else []
        if displaced:
            raise UserError("\n".join(displaced))

    def _write_final(self, occasion: _Occasion, with_state: bool) -> list[str]:
        displaced: list[str] = []
        try:
            displaced += self._write_anywhere(
                self.plan.model_path("final"), lambda path: self._write_model(path, occasion), "The trained model"
            )
        finally:  # a model can be made of the state again, so that nothing is lost where only the state finds a place
            if with_state:
                displaced += self._write_anywhere(
                    self.plan.state_path("final"), lambda folder: self._write_state(folder, occasion), "The state"
                )
        return displaced

    def _occasion(self, kind: SaveKind, position: Position, *, with_state: bool) -> _Occasion:
        """Have what is saved whole in the process that writes; every process calls it, whatever befalls the writing then."""
        return _Occasion(kind, position, gather(self.live.module, self.live.optimizer if with_state else None, keep=self.writes))

    def save_interrupted(self, position: Position) -> Path:
        """Save model and state where a run was stopped, and return the state's folder; see `after_training`.

        The state goes first: a model can be made of it again, and no second Ctrl+C or full disk must cost the run's place.
        """
        occasion = self._occasion("step", position, with_state=True)
        written = [self.plan.state_path("step", position.update)]

        def write_state(folder: Path) -> None:
            self._write_state(folder, occasion)
            written.append(folder)

        if self.writes:
            displaced = self._write_anywhere(written[0], write_state, "The state")
            model = self.plan.model_path("step", position.update)
            with suppress(Exception):  # it was told, and the command that continues from the state is still to be printed
                displaced += self._write_anywhere(model, lambda path: self._write_model(path, occasion), "The trained model")
            for told in displaced:
                log.error("%s", told)
        return written[-1]

    def _save_or_go_on(self, kind: SaveKind, number: int, position: Position) -> None:
        """Save in mid-run; a disk that is full now may have room at the next save, and nothing that was learned is lost."""
        occasion = self._occasion(kind, position, with_state=self.plan.should_save_state(kind))
        if self.writes:
            self._try_to_save(occasion, number)

    def _try_to_save(self, occasion: _Occasion, number: int) -> None:
        try:
            self._save(occasion, number)
        except UserError as error:
            log.error("%s Training goes on; nothing was removed, and the next save is tried as planned.", error)
        except Exception:  # a network of another package, or a defect: no reason to lose what was learned either
            log.exception("Saving failed. Training goes on; nothing was removed, and the next save is tried as planned.")

    def _write_anywhere(self, path: Path, write: Callable[[Path], None], what: str) -> list[str]:
        """Write what will not be in memory any longer: under its name, or else into a folder that takes it.

        Args:
            path: where it belongs.
            write: writes to a path.
            what: it is, as a sentence begins with it.

        Returns:
            A sentence where it lies elsewhere, or nothing.

        Raises:
            UserError: no folder takes it.
            Exception: as `write` raises it, where that is none of a full disk.
        """
        try:
            write(path)
            return []
        except Exception as error:
            log.error("%s could not be saved: %s", what, error)
            for folder in self.fallbacks:
                with suppress(Exception):
                    write(folder / path.name)
                    return [
                        f"{error} {what} is in {folder / path.name}: move it to a disk with space before that folder is emptied."
                    ]
                with suppress(OSError):  # it holds what was written before, or was never made
                    folder.rmdir()
            raise

    def _save(self, occasion: _Occasion, number: int) -> None:
        kind, position = occasion.kind, occasion.position
        self._write_model(self.plan.model_path(kind, number), occasion)
        if self.plan.should_save_state(kind):
            place = position.next_epoch() if kind == "epoch" else position
            self._write_state(self.plan.state_path(kind, number), replace(occasion, position=place))
            remove_outputs([self.plan.outdated_state(kind, number)], self.plan.folder)
        if outdated := self.plan.outdated_model(kind, number):
            others = [self.plan.variant_path(outdated, suffix) for suffix in self.variants]
            remove_outputs([outdated, *others], self.plan.folder)

    def _write_model(self, path: Path, occasion: _Occasion) -> None:
        make_folder(path.parent)
        self._write_weights(path, occasion, self.averaged())
        for suffix, weights in self.variants.items():
            self._write_weights(self.plan.variant_path(path, suffix), occasion, weights(self.dtype))

    def _write_weights(self, path: Path, occasion: _Occasion, weights: AbstractContextManager[None]) -> None:
        position = occasion.position
        with weights:
            self.trainable.save(path, self.dtype, self.metadata(path.stem, position), position, occasion.gathered)
        log.info("Saved %s", path)
        self._tell(Saved(path, "model", occasion.kind, position))

    def _write_state(self, folder: Path, occasion: _Occasion) -> None:
        position, gathered = occasion.position, occasion.gathered
        save_state(folder, self.live, position, self.seed, self.batches_per_epoch, self.losses(), self.identity, gathered)
        log.info("Saved the state %s", folder)
        self._tell(Saved(folder, "state", occasion.kind, position))

    def _tell(self, saved: Saved) -> None:
        for told in self.after_save:
            told(saved)


def fallback_folders() -> list[Path]:
    """Return where a run's last files go when its own folder takes none; new folders, so that nothing is replaced there."""
    name = f"atelier-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    return [Path.cwd() / name, Path(tempfile.gettempdir()) / name]
