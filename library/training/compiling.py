"""The blocks of the denoiser compiled, each kind of block once for every shape the run will meet, before the first step."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from library.dataset.batch import Batch
from library.dataset.foreign import ForeignDataset
from library.dataset.loader import Loader
from library.options.errors import UserError
from library.training.loop import TrainingRun
from library.training.progress import messages_above_bars
from library.training.setting import Setting, Trained

log = logging.getLogger(__name__)

GRAPHS_PER_SHAPE = 32
"""Most variants of one kind of block: its widths, with adapters and without, and the settings that datasets may change."""
LEAST_SHAPES = 8
"""For how many shapes there is room at least: those of a dataset class of the person's own are not known beforehand."""


class CompiledBlocks:
    """Blocks that run compiled where gradients are recorded; sample images and validation, with shapes of their own, run eager.

    Only `forward` of each block is replaced: its parameters keep their names and places.

    Args:
        blocks: of few kinds; those of the same kind share what is compiled.
        backend: the compiler.
        num_shapes: that the blocks will meet.
    """

    def __init__(self, blocks: Sequence[nn.Module], backend: str, num_shapes: int) -> None:
        import torch._dynamo.config as limits  # not before it is needed: it takes a second

        limits.recompile_limit = max(limits.recompile_limit, GRAPHS_PER_SHAPE * num_shapes)
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * GRAPHS_PER_SHAPE * num_shapes)
        self._eager: list[tuple[nn.Module, Callable[..., Any]]] = [(block, block.forward) for block in blocks]
        for block, eager in self._eager:
            block.forward = _while_recording(torch.compile(eager, backend=backend, dynamic=False), eager)

    def __len__(self) -> int:
        return len(self._eager)

    def undo(self) -> None:
        """Run as before."""
        for block, eager in self._eager:
            block.forward = eager


def _while_recording(compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs) if torch.is_grad_enabled() else eager(*args, **kwargs)

    return forward


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
    kinds = setting.family.large_modules
    found = [*denoiser.modules(), *(() if trained.control is None else trained.control.modules())]
    modules = [module for module in found if type(module).__name__ in kinds]
    blocks = CompiledBlocks(modules, options.dynamo_backend, max(len(examples), LEAST_SHAPES))
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
    except Exception as error:  # compilers raise exceptions of all kinds
        blocks.undo()
        with _as_it_was(run):  # what is not the compiler's fault comes again without it
            try_out(run, trained, next(load(setting, examples)), setting)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning(
            "--torch_compile: %s cannot compile the model (%s); training goes on without it.", options.dynamo_backend, reason
        )
        return
    log.info(
        "Compiled %d blocks with %s for %d shapes in %.0f s; sample images and validation run without.",
        len(blocks),
        options.dynamo_backend,
        len(examples),
        time.monotonic() - began,
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
