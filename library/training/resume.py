"""Where a run starts: at the beginning, where a saved state stood, or where `--initial_epoch` and `--initial_step` say."""

import logging
from pathlib import Path

from library.options.checks_hub import is_on_hub
from library.options.errors import UserError
from library.options.groups.hub import HubOptions
from library.options.groups.state import StateOptions
from library.training.hub import download_state
from library.training.outputs import RunLength
from library.training.position import Position
from library.training.state import SavedPlace, read_place

log = logging.getLogger(__name__)


def saved_place(options: StateOptions, hub: HubOptions) -> SavedPlace | None:
    """Read where the state of `--resume` stood, once it is on this machine; None where nothing is resumed.

    Raises:
        UserError: if the folder is missing, cannot be fetched or is not a training state.
    """
    if options.resume is None:
        return None
    return read_place(download_state(options.resume, hub.huggingface_token) if is_on_hub(options, hub) else Path(options.resume))


def start_position(
    options: StateOptions, saved: SavedPlace | None, length: RunLength, batches_per_epoch: int, accumulation: int
) -> Position:
    """Decide where a run starts. Counters never restart: files and steps are numbered from the beginning of the first run.

    `--initial_step` and `--initial_epoch` win over a saved state. Without `--skip_until_initial_step` the epoch of that step is
    trained from its beginning.

    Args:
        options: what was asked for.
        saved: where the resumed state stood.
        length: of the whole run.
        batches_per_epoch: of one process.
        accumulation: batches per update.

    Raises:
        UserError: if nothing is left to train.
    """
    initial = _initial_update(options, length)
    if initial is not None:
        if saved is not None:
            log.warning("--initial_step and --initial_epoch win over step %d of the resumed state", saved.update)
        if not options.skip_until_initial_step:
            initial = initial // length.updates_per_epoch * length.updates_per_epoch
        if saved is None:
            log.info("The learning-rate schedule starts at its beginning: nothing is resumed that says where it stood.")
        position = Position.at_update(initial, batches_per_epoch, accumulation)
    elif saved is not None:
        position = _continued(saved, batches_per_epoch, accumulation)
    else:
        return Position()
    if position.update >= length.total_updates:
        raise UserError(
            f"Nothing is left to train: the run starts at step {position.update} and ends at step {length.total_updates}. "
            "Raise --max_train_steps or --max_train_epochs, which count from the beginning of the first run."
        )
    log.info("Training starts at step %d, epoch %d, batch %d", position.update, position.epoch, position.batch)
    return position


def _initial_update(options: StateOptions, length: RunLength) -> int | None:
    if options.initial_step is not None:
        return options.initial_step
    if options.initial_epoch is not None:
        return (options.initial_epoch - 1) * length.updates_per_epoch
    return None


def _continued(saved: SavedPlace, batches_per_epoch: int, accumulation: int) -> Position:
    """Return the saved place, or the nearest one where the data or the number of processes has changed since."""
    if saved.position is None:
        return Position.at_update(saved.update, batches_per_epoch, accumulation)
    if saved.batches_per_epoch == batches_per_epoch:
        return saved.position
    share = saved.position.batch / (saved.batches_per_epoch or 1)
    batch = int(share * batches_per_epoch) // accumulation * accumulation
    log.warning(
        "An epoch has %d batches now and had %s when the state was saved, because data, batch size or the number of processes "
        "changed: the run continues at batch %d of epoch %d, and is not the one it would have been.",
        batches_per_epoch,
        saved.batches_per_epoch,
        batch,
        saved.position.epoch,
    )
    return Position(saved.position.epoch, batch, saved.position.update)
