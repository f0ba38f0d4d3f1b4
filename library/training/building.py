"""What a training run is built of, in the order it is built: the same for a run, and for the forecast of its memory."""

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from library.files.atomic import make_folder
from library.models.family import Family, ModelSource
from library.optim.optimizers import make_optimizer
from library.optim.schedules import make_schedule
from library.options.dataset_config import DatasetConfig
from library.options.scripts import TrainingOptions
from library.training.accelerator import DTypes, make_accelerator, shared_seed
from library.training.data_terms import describe_data_terms, unread_attributes
from library.training.denoiser import check_swapping
from library.training.engine import Engine, make_engine
from library.training.events import EventLog
from library.training.loader import make_loader
from library.training.logs import RunSummary
from library.training.loop import TrainingRun
from library.training.outputs import RunLength
from library.training.preflight import open_dataset
from library.training.preparation import TextSide, model_source
from library.training.setting import MetadataAt, PartDTypes, Setting, Trained
from library.training.step import ModelParts, NanWatch, TrainStep

log = logging.getLogger(__name__)


class Recipe(Protocol):
    """What differs from script to script."""

    tracker_name: str
    """Project name in logs, unless another is given."""

    def dtypes_of_parts(self, setting: Setting) -> PartDTypes:
        """Say in which types the denoiser and the text encoders are loaded."""

    def make_trainable(self, setting: Setting, denoiser: nn.Module, text: TextSide, vae: nn.Module | None) -> Trained:
        """Attach or unfreeze what is trained, on the device and in the type it is trained in."""

    def metadata(self, setting: Setting, trained: Trained) -> MetadataAt:
        """Say what saved files say about themselves."""


def make_setting(
    open_family: Callable[[ModelSource], Family],
    options: TrainingOptions,
    data: DatasetConfig,
    saved_seed: int | None,
    events: EventLog,
    pretended: Any = None,
) -> Setting:
    """Start accelerate, open model and data, and work out how long the run is.

    Args:
        open_family: opens the base model.
        options: checked.
        data: the dataset definition, checked.
        saved_seed: of the run that is resumed; used where none is given.
        events: of the run.
        pretended: stands for accelerate where nothing is trained, and no folder is made.
    """
    started_at = time.time()
    accelerator = pretended or make_accelerator(options.precision, options.distributed)
    if pretended is None and accelerator.is_main_process and options.output.output_dir:
        make_folder(options.output.output_dir)
    given = (options.length.seed, saved_seed)
    seed = shared_seed(accelerator, *given) if pretended is None else next((each for each in given if each is not None), 0)
    dtypes = DTypes.of(options.precision, options.precision.no_half_vae, options.output.save_precision)
    family = open_family(model_source(options.model, options.precision))
    check_swapping(family, options)
    objective = family.make_objective(options.model, options.noise, options.loss, accelerator.device)
    dataset = open_dataset(options, data, seed, family, accelerator.num_processes)
    batches_per_epoch = dataset.batches_per_epoch(accelerator.num_processes)
    times = options.length
    length = RunLength.of(batches_per_epoch, times.gradient_accumulation_steps, times.max_train_steps, times.max_train_epochs)
    return Setting(options, accelerator, dtypes, seed, family, objective, dataset, batches_per_epoch, length, started_at, events)


def build_step(setting: Setting, trained: Trained, parts: ModelParts) -> tuple[TrainingRun, Engine, torch.optim.Optimizer]:
    """Build optimizer, schedule, step and loader: everything that an update is made of."""
    options = setting.options
    optimizer = make_optimizer(options.optimizer, trained.groups)
    schedule = make_schedule(options.scheduler, options.optimizer, optimizer, setting.length.total_updates)
    step = TrainStep(
        trained.trainable.module,
        parts,
        setting.objective,
        train_text=trained.trains_text,
        set_strength=trained.trainable.set_strength,
        masks_from_control=options.loss.masked_loss,
        see=None if trained.control is None else trained.control.see,
    )
    engine = make_engine(setting, trained, step, optimizer)
    run = TrainingRun(
        accelerator=engine.accelerator,
        step=engine.step,
        trainable=trained.trainable,
        updater=engine.updater,
        schedule=schedule,
        batches=make_loader(setting, persistent=options.dataset.persistent_data_loader_workers).epoch,
        batches_per_epoch=setting.batches_per_epoch,
        accumulation=options.length.gradient_accumulation_steps,
        max_updates=setting.length.total_updates,
        seed=setting.seed,
        observers=[NanWatch(step)],
    )
    return run, engine, optimizer


def report(setting: Setting) -> None:
    """Log the figures a person wants to check before waiting for hours."""
    sections = setting.dataset.sections
    summary = RunSummary(
        num_train_images=setting.dataset.num_train_uses,
        num_reg_images=sum(section.num_reg_images for section in sections),
        num_validation_images=len(setting.dataset.held_out),
        batches_per_epoch=setting.batches_per_epoch,
        num_epochs=setting.length.num_epochs,
        batch_sizes=[section.config.batch_size for section in sections],
        num_processes=setting.accelerator.num_processes,
        accumulation=setting.options.length.gradient_accumulation_steps,
        total_updates=setting.length.total_updates,
        loss_terms=setting.objective.describe() + describe_data_terms(setting.dataset.config, setting.options.loss),
    )
    log.info("Training\n%s", "\n".join(summary.lines()))
    if unread := unread_attributes(setting.dataset.config):
        log.warning("%s", unread)
