"""Batches on their way to the device: each is there before the step that needs it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from library.dataset.batch import Batch
from library.options.errors import UserError


@dataclass(frozen=True)
class Sent:
    """A batch on its way to the device."""

    batch: Batch
    """As the loader gave it."""
    copy: Batch
    """On the device, but not there yet."""
    arrival: torch.cuda.Event | None = None
    """Marks the end of the transfer; None where there is no other stream to wait for."""

    def arrive(self) -> Batch:
        """Return the batch on the device, for what is done in its current stream from now on; only the device waits."""
        if self.arrival is not None:
            stream = torch.cuda.current_stream(self.copy.loss_weights.device)
            stream.wait_event(self.arrival)
            for tensor in self.copy.tensors():
                tensor.record_stream(stream)  # its memory goes back to the stream it was sent on, but not before it was used here
        return self.copy


def sender(device: torch.device) -> Callable[[Batch], Sent]:
    """Return what sends batches to a device; to a GPU beside its computation, on a stream of their own.

    Args:
        device: that trains; a GPU wants batches in page-locked memory.
    """
    if device.type != "cuda":
        return lambda batch: Sent(batch, batch.to(device))
    stream = torch.cuda.Stream(device)

    def send(batch: Batch) -> Sent:
        with torch.cuda.stream(stream):
            copy = batch.to(device)
            arrival = torch.cuda.Event()
            arrival.record(stream)
        return Sent(batch, copy, arrival)

    return send


def sent_ahead(batches: Iterable[Batch], send: Callable[[Batch], Sent]) -> Iterator[Sent]:
    """Yield batches, each of which was sent off before the one ahead of it is trained on.

    Args:
        batches: as the loader gives them.
        send: as `sender` gives it.

    Raises:
        UserError: an image or cache file cannot be read; all batches before it were given out.
    """
    coming = iter(batches)
    ahead: Sent | None = None
    while True:
        failure: UserError | None = None
        following: Batch | None = None
        try:
            following = next(coming, None)
        except UserError as error:
            failure = error
        sent = None if following is None else send(following)
        if ahead is not None:
            yield ahead
        if failure is not None:
            raise failure
        if sent is None:
            return
        ahead = sent
