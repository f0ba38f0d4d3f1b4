"""The blocks of the denoiser compiled, each kind of block once for every shape the run will meet, before the first step."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from library.dataset.batch import Batch
from library.dataset.foreign import ForeignDataset
from library.dataset.loader import Loader
from library.models.family import Family
from library.options.errors import UserError
from library.training.compiled_blocks import CompiledBlocks
from library.training.loop import TrainingRun
from library.training.progress import messages_above_bars
from library.training.setting import Setting, Trained
from library.training.trainable import NetworkTrainable, Trainable

log = logging.getLogger(__name__)


def compile_denoiser(setting: Setting, run: TrainingRun, trained: Trained, denoiser: nn.Module) -> None:
    """Compile the denoiser's blocks where `--torch_compile` asks for it, or say in a sentence why they run as they are.

    Every shape is tried out, forward and backward, with a batch of the first epoch; weights and random numbers stay as they are.

    Args:
        setting: of the run.
        run: everything is attached to its step.
        trained: what is trained.
        denoiser: whose large modules are compiled.

    Raises:
        UserError: a picture cannot be read.
    """
    options = setting.options.compile
    if not options.torch_compile:
        return
    examples = batch_of_each_shape(setting)
    blocks = compiled_blocks(setting.family, trained.trainable, denoiser, options.dynamo_backend, trained.control)
    if trained.is_divided or not examples:  # every process would have to meet the same shapes in the same order
        log.info("The %d blocks of the denoiser are compiled by %s as they are met.", len(blocks), options.dynamo_backend)
        return
    began = time.monotonic()
    visible = setting.accelerator.is_local_main_process
    try:
        with messages_above_bars(), tqdm(desc="compiling shapes", total=len(examples), disable=not visible) as bar, _as_it_was(run):
            for batch in load(setting, examples):
                try_out(run, trained, batch, setting)
                bar.update()
    except UserError:
        raise
    except Exception as error:  # what was compiled without a word, and cannot run
        blocks.undo()
        with _as_it_was(run):  # what is not the compiler's fault comes again without it
            try_out(run, trained, next(load(setting, examples)), setting)
        blocks.give_up(error)
        return
    if blocks.num_compiled:
        log.info(
            "Compiled %d of %d blocks with %s for %d shapes in %.0f s; sample images and validation run without.",
            blocks.num_compiled,
            len(blocks),
            options.dynamo_backend,
            len(examples),
            time.monotonic() - began,
        )


def compiled_blocks(family: Family, trainable: Trainable, denoiser: nn.Module, backend: str, control: Any = None) -> CompiledBlocks:
    """Return the blocks of the denoiser, and of a network that makes it follow control images, about to be compiled.

    Args:
        family: knows which modules are large.
        trainable: what is trained, attached to the denoiser.
        denoiser: whose blocks they are.
        backend: the compiler.
        control: the network that makes it follow control images, where there is one.
    """
    parts: dict[str, Any] = {"": denoiser} if control is None else {"": denoiser, "control net: ": control}
    blocks = {
        prefix + name: module
        for prefix, part in parts.items()
        for name, module in part.named_modules()
        if type(module).__name__ in family.large_modules
    }
    network = trainable if isinstance(trainable, NetworkTrainable) else None
    return CompiledBlocks(
        blocks,
        backend,
        lambda: None if network is None else network.strength,
        is_all=network is None or network.is_ours,
    )


def batch_of_each_shape(setting: Setting) -> list[tuple[int, ...]]:
    """Return the uses of images of one batch of this process for every size of bucket and batch in the run.

    Of a dataset class of the person's own nothing is known beforehand, and the list is empty.
    """
    if isinstance(setting.dataset, ForeignDataset):
        return []
    dataset, accelerator = setting.dataset, setting.accelerator
    plan = dataset.plan(1, accelerator.num_processes)
    found: dict[tuple[Any, ...], tuple[int, ...]] = {}
    for number in range(len(plan.batches)):
        uses = plan.share(number, accelerator.process_index, accelerator.num_processes).uses
        item = dataset.item_of(uses[0])
        found.setdefault((item.section, item.geometry.bucket, len(uses)), uses)
    return list(found.values())


def load(setting: Setting, batches: Sequence[tuple[int, ...]]) -> Iterator[Batch]:
    """Load batches in this process."""
    return Loader(setting.dataset, total_updates=setting.length.total_updates).whole(batches, epoch=1)


def try_out(run: TrainingRun, trained: Trained, batch: Batch, setting: Setting) -> None:
    """Run a batch forward and backward as training does, and keep nothing of it.

    The gradient is taken of the first parameter of each group: on its way there it passes all blocks, and no other gradient
    takes memory or sets off an update.
    """
    accelerator = setting.accelerator
    first = [group["params"][0] for group in trained.groups]
    step: Any = accelerator.unwrap_model(run.step)
    with accelerator.autocast():
        losses = step.losses_at(batch.to(accelerator.device), [500], [batch.draw_seeds], batch.draw_seeds)
    torch.autograd.grad(losses.mean(), first, allow_unused=True)


@contextmanager
def _as_it_was(run: TrainingRun) -> Iterator[None]:
    """Be in training mode, and leave random numbers and counts as they were."""
    step: Any = run.accelerator.unwrap_model(run.step)
    device, count = run.accelerator.device, step.num_nan_images
    run.trainable.on_epoch_start()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        step.num_nan_images = count
