"""Batches are on the device before the step that needs them, in their order, whole."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from library.dataset.batch import Batch
from library.options.errors import UserError
from library.training.feeding import Sent, sender, sent_ahead
from tests.training.fake_run import dataset


def test_each_batch_is_sent_before_the_one_ahead_of_it_is_given_out() -> None:
    events: list[str] = []

    def send(batch: Batch) -> Sent:
        events.append(f"sent {batch.draw_seeds[0]}")
        return Sent(batch, batch)

    batches = [replace(batch, draw_seeds=[number]) for number, batch in enumerate(dataset(3))]
    events.extend(f"trained {sent.arrive().draw_seeds[0]}" for sent in sent_ahead(batches, send))
    assert events == ["sent 0", "sent 1", "trained 0", "sent 2", "trained 1", "trained 2"]
    assert list(sent_ahead([], send)) == []


def test_a_file_that_cannot_be_read_ends_the_run_after_the_batches_before_it() -> None:
    def batches() -> Iterator[Batch]:
        yield from dataset(2)
        raise UserError("broken.png cannot be read.")

    coming = sent_ahead(batches(), sender(torch.device("cpu")))
    assert [next(coming).batch.size for _ in range(2)] == [1, 1]
    with pytest.raises(UserError, match="broken"):
        next(coming)


def test_all_tensors_of_a_batch_travel() -> None:
    batch = dataset(1)[0]
    here = sender(torch.device("meta"))(batch).arrive()
    assert {tensor.device.type for tensor in here.tensors()} == {"meta"}
    assert len(list(here.tensors())) == len(list(batch.tensors())) >= 5


@pytest.mark.gpu
def test_a_gpu_gets_batches_beside_its_work_and_whole() -> None:
    device = torch.device("cuda")
    batches = [replace(batch, latents=torch.full((1, 4, 512, 512), float(n))).pin_memory() for n, batch in enumerate(dataset(8))]
    busy = torch.randn(4096, 4096, device=device)
    sums = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for sent in sent_ahead(batches, sender(device)):
            busy = busy @ busy / 64
            sums.append(sent.arrive().latents.mean())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [float(value) for value in sums] == [float(n) for n in range(8)]
