"""Load the batches of an epoch, ahead of time in worker processes where there are any.

A worker receives everything that decides a batch with the request for it (uses, weight, epoch, update), so the number of workers
changes nothing but speed.
"""

import copy
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader

from library.dataset.batch import Batch
from library.dataset.batch_images import load_images, size_conditioning
from library.dataset.cached import LatentsInMemory, TextFiles, TextsInMemory
from library.dataset.dataset import Dataset
from library.dataset.foreign import ForeignDataset, load_foreign_batch
from library.dataset.plan import EpochPlan, Share
from library.models.family import TextCond
from library.options.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Request:
    epoch: int
    share: Share
    update: int
    total_updates: int


@dataclass(frozen=True)
class _Failure:
    """Travels from a worker in place of a batch; an exception would arrive wrapped in a traceback."""

    message: str


class Loader:
    """Loads the batches of one process, epoch after epoch.

    Args:
        dataset: with its caches filled.
        process_index: which share of each global batch is loaded.
        num_processes: processes that share each global batch.
        num_workers: loading processes; 0 loads when a batch is asked for. No more than the machine has CPUs are started, and
            none when latents are in memory, where nothing is left to wait for.
        persistent: keep the workers between epochs.
        pin: give batches in page-locked memory.
        accumulation: batches per optimizer update; an update never reaches into the next epoch.
        total_updates: of the whole run; 0 where it is not known, then settings that are a fraction of it are off.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        persistent: bool = False,
        pin: bool = False,
        accumulation: int = 1,
        total_updates: int = 0,
    ) -> None:
        self._dataset = dataset
        self._num_processes = num_processes
        self._pin = pin
        self._requests = _Requests(process_index, num_processes, accumulation, total_updates)
        workers = _useful_workers(dataset, num_workers)
        self._loader: DataLoader[Any] = DataLoader(
            _Reader(dataset),  # type: ignore[arg-type]  # its indices are requests
            batch_size=None,
            sampler=self._requests,
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            pin_memory=pin,
            multiprocessing_context=_start_method() if workers else None,
            worker_init_fn=_prepare_worker if workers else None,
            generator=torch.Generator().manual_seed(0),  # else each epoch takes a number from torch's own generator
        )

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield this process's batches of an epoch (counted from 1).

        Args:
            epoch: which epoch.
            start_batch: batches already trained on; nothing is loaded for them.

        Raises:
            UserError: an image or cache file has become unreadable; it is named.
        """
        self._requests.choose(self._dataset.plan(epoch, self._num_processes), start_batch)
        yield from self._loaded()

    def held_out(self, max_batches: int | None = None) -> Iterator[Batch]:
        """Yield this process's batches of held-out images, always the same ones: every n-th, n being the number of processes.

        Args:
            max_batches: most batches over all processes; None loads all.

        Raises:
            UserError: an image or cache file has become unreadable; it is named.
        """
        yield from self.whole(self._dataset.held_out_batches()[:max_batches])

    def whole(self, batches: Sequence[tuple[int, ...]], epoch: int = 0) -> Iterator[Batch]:
        """Yield those batches that are this process's turn, each undivided.

        Args:
            batches: uses of images.
            epoch: whose random draws they get; 0 for held-out images.

        Raises:
            UserError: as above.
        """
        self._requests.choose_whole(EpochPlan(epoch, batches))
        yield from self._loaded()

    def _loaded(self) -> Iterator[Batch]:
        for loaded in self._loader:
            if isinstance(loaded, _Failure):
                raise UserError(loaded.message)
            yield self._with_texts_in_memory(loaded)

    def _with_texts_in_memory(self, batch: Batch) -> Batch:
        """Add texts held in this process, which workers are spared a copy of."""
        texts = self._dataset.texts
        if not isinstance(texts, TextsInMemory):
            return batch
        cond = stack_cond([texts.read(caption) for caption in batch.captions])
        return replace(batch, text_cond={key: value.pin_memory() for key, value in cond.items()} if self._pin else cond)


def load_batch(dataset: Dataset, epoch: int, share: Share, *, update: int = 0, total_updates: int = 0) -> Batch:
    """Load one batch in this process; texts in memory are left out.

    Args:
        dataset: with its caches filled.
        epoch: counted from 1.
        share: of the epoch's plan.
        update: number of the optimizer update the batch is for, from 0.
        total_updates: of the whole run.

    Raises:
        UserError: an image or cache file cannot be read; it is named.
    """
    items = [dataset.item_of(use) for use in share.uses]
    draws = [dataset.draws(use, epoch, update=update, total_updates=total_updates) for use in share.uses]
    texts = dataset.texts if isinstance(dataset.texts, TextFiles) else None
    prior = dataset.config.prior_loss_weight
    pairs = list(zip(items, draws, strict=True))
    pictures = load_images(dataset, pairs)
    return Batch(
        images=pictures.images,
        latents=pictures.latents,
        captions=[draw.caption for draw in draws],
        text_cond=stack_cond([texts.read(item, draw.caption) for item, draw in pairs]) if texts else None,
        sizes=size_conditioning(dataset, pairs),
        loss_weights=torch.tensor([share.weight * (prior if item.is_reg else 1.0) for item in items], dtype=torch.float32),
        draw_seeds=[draw.seed for draw in draws],
        image_keys=[item.path for item in items],
        masks=pictures.masks,
        conditioning=pictures.conditioning,
        network_multiplier=dataset.sections[items[0].section].config.network_multiplier,
        custom_attributes=[dataset.sections[item.section].subset(item).custom_attributes for item in items],
        section=items[0].section,
    )


def stack_cond(conds: Sequence[TextCond]) -> TextCond:
    """Put samples without a batch axis together."""
    return {key: torch.stack([cond[key] for cond in conds]) for key in conds[0]}


class _Reader:
    """What a worker holds: the dataset without what lies in this process's memory."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, request: _Request) -> Batch | _Failure:
        try:
            times = {"update": request.update, "total_updates": request.total_updates}
            if isinstance(self._dataset, ForeignDataset):
                return load_foreign_batch(self._dataset, request.epoch, request.share, **times)
            return load_batch(self._dataset, request.epoch, request.share, **times)
        except UserError as error:
            return _Failure(str(error))
        except Exception as error:
            error.add_note(f"while loading {', '.join(self._dataset.names_of(request.share.uses))}")
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Travel light to a worker that is not forked: texts in memory are added by the main process."""
        slim = copy.copy(self._dataset)
        if isinstance(slim.texts, TextsInMemory):
            slim.texts = None
        return {"_dataset": slim}


class _Requests:
    """The sampler: what one process loads of the epoch, or of the held-out images, that were chosen last."""

    def __init__(self, process_index: int, num_processes: int, accumulation: int, total_updates: int) -> None:
        self._process_index = process_index
        self._num_processes = num_processes
        self._accumulation = accumulation
        self._total_updates = total_updates
        self._plan = EpochPlan(1, ())
        self._start = 0
        self._shared = True

    def choose(self, plan: EpochPlan, start: int) -> None:
        """Set the epoch, of each batch of which every process gets a share, and the batch to begin with."""
        self._plan, self._start, self._shared = plan, start, True

    def choose_whole(self, plan: EpochPlan) -> None:
        """Set batches that go to the processes in turn, none of which is divided."""
        own = plan.batches[self._process_index :: self._num_processes]
        self._plan, self._start, self._shared = EpochPlan(plan.epoch, own), 0, False

    def __iter__(self) -> Iterator[_Request]:
        own = (self._process_index, self._num_processes) if self._shared else (0, 1)
        return map(partial(self._request, self._plan, own), range(self._start, len(self._plan.batches)))

    def __len__(self) -> int:
        return len(self._plan.batches) - self._start

    def _request(self, plan: EpochPlan, own: tuple[int, int], batch: int) -> _Request:
        updates_before = (plan.epoch - 1) * -(-len(plan.batches) // self._accumulation)
        update = updates_before + batch // self._accumulation
        return _Request(plan.epoch, plan.share(batch, *own), update, self._total_updates)


def _useful_workers(dataset: Dataset, wanted: int) -> int:
    if isinstance(dataset.latents, LatentsInMemory):
        return 0
    return min(wanted, os.cpu_count() or 1)


def _start_method() -> str:
    """Fork on Linux, where it starts at once; elsewhere a fresh interpreter is the only safe way."""
    return "fork" if sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods() else "spawn"


def _prepare_worker(worker: int) -> None:
    """Leave Ctrl+C to the main process, and the other CPUs to the other workers."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)


def _as_it_is(batch: Any) -> Any:
    return batch
