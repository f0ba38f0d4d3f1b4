"""Where a run stands, and what follows from it for the epoch and batch it continues at."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Position:
    """A place in a run, always between two optimizer updates."""

    epoch: int = 1
    """The epoch being trained, counted from 1."""
    batch: int = 0
    """Batches of that epoch already trained on, by each process."""
    update: int = 0
    """Optimizer updates made so far, over all resumed runs together."""

    def after_update(self, batches: int) -> "Position":
        """Return the place after one more update, when `batches` batches of the epoch are done."""
        return replace(self, batch=batches, update=self.update + 1)

    def next_epoch(self) -> "Position":
        """Return the start of the following epoch."""
        return replace(self, epoch=self.epoch + 1, batch=0)

    @classmethod
    def at_update(cls, update: int, batches_per_epoch: int, accumulation: int) -> "Position":
        """Return the place after `update` updates of a run that started at the beginning.

        Args:
            update: updates made, 0 or more.
            batches_per_epoch: batches of each process in an epoch.
            accumulation: batches per update; the last update of an epoch may have fewer.
        """
        updates_per_epoch = -(-batches_per_epoch // accumulation)
        epochs, rest = divmod(update, updates_per_epoch)
        return cls(epoch=epochs + 1, batch=min(rest * accumulation, batches_per_epoch), update=update)


def window_size(batch: int, batches_per_epoch: int, accumulation: int) -> int:
    """Return how many batches the update has that batch number `batch` (from 0) of an epoch contributes to.

    The last update of an epoch takes what is left, so that no image waits for the next epoch.
    """
    start = batch // accumulation * accumulation
    return min(accumulation, batches_per_epoch - start)
