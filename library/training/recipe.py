"""From checked options to a finished run: the verbs every training script shares, in the order they are carried out.

A script hands over a `Recipe`: what is trained, and what a saved file says about itself. Everything else is here, once.
"""

import logging
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import nn

from library.files.atomic import make_folder
from library.generation.request import ImageRequest
from library.models.family import Family, ModelSource
from library.optim.eval_mode import averaged_weights
from library.optim.optimizers import make_optimizer
from library.optim.schedules import make_schedule
from library.options.dataset_config import DatasetConfig
from library.options.scripts import TrainingOptions
from library.training.accelerator import DTypes, make_accelerator, shared_seed
from library.training.compiling import compile_denoiser
from library.training.data_terms import describe_data_terms, unread_attributes
from library.training.denoiser import arrange_denoiser, load_denoiser
from library.training.engine import make_engine
from library.training.events import EventLog, events_of_run
from library.training.hub import open_uploads
from library.training.identity import check_same_run, identity_of
from library.training.interrupt import StopRequest
from library.training.loader import make_loader
from library.training.logs import RunSummary, TrainingLog
from library.training.looking import look, only_looks
from library.training.loop import TrainingRun, train
from library.training.observing import add_observers, tell_start
from library.training.out_of_memory import Resident, telling_of_memory
from library.training.outputs import RunLength, SavePlan
from library.training.position import Position
from library.training.preflight import open_dataset
from library.training.preparation import TextSide, model_source, prepare_latents, prepare_text
from library.training.resume import saved_place, start_position
from library.training.resume_command import resume_command, secrets_given
from library.training.saving import Saver
from library.training.setting import MetadataAt, PartDTypes, Setting, Trained
from library.training.sharding import divided
from library.training.state import Resumable, SavedPlace, load_state
from library.training.step import ModelParts, NanWatch, TrainStep
from library.training.trained_table import report_trained
from library.training.trouble import add_guard

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


def run_recipe(
    recipe: Recipe,
    open_family: Callable[[ModelSource], Family],
    options: TrainingOptions,
    data: DatasetConfig,
    requests: Sequence[ImageRequest],
) -> None:
    """Carry out a training run, or look at its data where `--dataset_report` or `--debug_dataset` asks for that instead.

    Args:
        recipe: of the script.
        open_family: opens the base model.
        options: checked.
        data: the dataset definition, checked.
        requests: sample prompts; empty where no sample images are drawn.

    Raises:
        UserError: something the person gave cannot be used.
        SystemExit: the run was stopped by a signal, after it was saved.
    """
    saved = saved_place(options.state, options.hub)
    if only_looks(options):
        look(open_family, options, data, saved.seed if saved else None)
        return
    with events_of_run(options.logging.log_events) as events, telling_of_memory(options) as resident:
        setting = make_setting(open_family, options, data, saved.seed if saved else None, events)
        carry_out(recipe, setting, saved, requests, resident)


def carry_out(
    recipe: Recipe, setting: Setting, saved: SavedPlace | None, requests: Sequence[ImageRequest], resident: Resident
) -> None:
    """Load the model, make its parts trainable, and train; see `run_recipe`.

    Args:
        recipe: of the script.
        setting: of the run.
        saved: where the resumed state stood, if any.
        requests: sample prompts.
        resident: learns what lies in memory.
    """
    options = setting.options
    accelerator, length = setting.accelerator, setting.length
    identity = identity_of(setting)
    if saved is not None:
        check_same_run(saved, identity, options)
    uploads = open_uploads(options.hub) if accelerator.is_main_process else None
    start = start_position(options.state, saved, length, setting.batches_per_epoch, options.length.gradient_accumulation_steps)

    part_dtypes = recipe.dtypes_of_parts(setting)
    text = prepare_text(setting, requests, part_dtypes)
    vae = prepare_latents(setting, keep=bool(requests))
    denoiser = load_denoiser(setting, part_dtypes)
    torch.manual_seed(setting.seed)  # decides the initial weights of what is trained
    trained = divided(setting, recipe.make_trainable(setting, denoiser, text, vae))
    arrange_denoiser(setting.family, denoiser, trained.trainable.module, options.precision, accelerator.device)

    parts = ModelParts(setting.family, denoiser, text.encoders, vae, options.cache.vae_batch_size, setting.caption_style)
    run, saver = build_run(recipe, setting, trained, parts)
    resident.parts, resident.saver = parts, saver
    resident.batch_size = max(section.config.batch_size for section in setting.dataset.sections)
    report(setting)
    report_trained(setting, trained, saver.live.optimizer.defaults, start.update)
    compile_denoiser(setting, run, trained, denoiser)
    saver.identity = identity
    training_log = add_observers(run, saver, setting, trained, parts, text, requests, tracker_name=recipe.tracker_name, start=start)
    if uploads is not None:
        saver.after_save.append(uploads.add)
    try:
        if saved is not None:
            load_saved(saved, saver, training_log)
        tell_start(setting, start)
        with uploads or nullcontext(), StopRequest() as stop:  # what is uploaded in the end, one Ctrl+C interrupts
            if uploads is not None:
                uploads.is_stopping = lambda: stop.signal is not None
            end = train(run, start, stop)
            if stop.agreed:
                stop_saved(saver, end, stop, setting)
    finally:
        training_log.close()


def load_saved(saved: SavedPlace, saver: Saver, training_log: TrainingLog) -> None:
    """Take up the state of the run that is resumed, with its averages of the loss."""
    load_state(saved.folder, saver.live)
    if saved.losses:
        training_log.losses.load_state_dict(saved.losses)


def make_setting(
    open_family: Callable[[ModelSource], Family],
    options: TrainingOptions,
    data: DatasetConfig,
    saved_seed: int | None,
    events: EventLog,
) -> Setting:
    """Start accelerate, open model and data, and work out how long the run is.

    Args:
        open_family: opens the base model.
        options: checked.
        data: the dataset definition, checked.
        saved_seed: of the run that is resumed; used where none is given.
        events: of the run.
    """
    started_at = time.time()
    accelerator = make_accelerator(options.precision, options.distributed)
    if accelerator.is_main_process and options.output.output_dir:
        make_folder(options.output.output_dir)
    seed = shared_seed(accelerator, options.length.seed, saved_seed)
    dtypes = DTypes.of(options.precision, options.precision.no_half_vae, options.output.save_precision)
    family = open_family(model_source(options.model, options.precision))
    objective = family.make_objective(options.model, options.noise, options.loss, accelerator.device)
    dataset = open_dataset(options, data, seed, family, accelerator.num_processes)
    batches_per_epoch = dataset.batches_per_epoch(accelerator.num_processes)
    times = options.length
    length = RunLength.of(batches_per_epoch, times.gradient_accumulation_steps, times.max_train_steps, times.max_train_epochs)
    return Setting(options, accelerator, dtypes, seed, family, objective, dataset, batches_per_epoch, length, started_at, events)


def build_run(recipe: Recipe, setting: Setting, trained: Trained, parts: ModelParts) -> tuple[TrainingRun, Saver]:
    """Build optimizer, schedule, step, loader and saver: everything the loop needs but those who look on."""
    options, accelerator = setting.options, setting.accelerator
    optimizer = make_optimizer(options.optimizer, trained.groups)
    schedule = make_schedule(options.scheduler, options.optimizer, optimizer, setting.length.total_updates)
    step = TrainStep(
        trained.trainable.module,
        parts,
        setting.objective,
        train_text=trained.trains_text,
        set_strength=trained.trainable.set_strength,
        masks_from_control=options.loss.masked_loss,
        see=trained.control and trained.control.see,
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
    saver = Saver(
        plan=SavePlan.of(options.output, options.state, trained.extension, setting.length.num_epochs),
        trainable=trained.trainable,
        live=Resumable(trained.trainable.module, engine.optimizer, schedule, accelerator.scaler),
        dtype=setting.dtypes.saved,
        metadata=recipe.metadata(setting, trained),
        averaged=lambda: averaged_weights(optimizer),
        writes=accelerator.is_main_process,
        seed=setting.seed,
        batches_per_epoch=setting.batches_per_epoch,
    )
    add_guard(run, saver, setting, trained, optimizer)
    return run, saver


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


def stop_saved(saver: Saver, end: Position, stop: StopRequest, setting: Setting) -> None:
    """Save where a run was stopped, say how it continues, and end the process as the signal would have.

    Raises:
        SystemExit: always; 128 plus the signal's number.
    """
    state = saver.save_interrupted(end)
    log.warning("Stopped at step %d. The same command with --resume continues exactly there:", end.update)
    log.warning("  %s", shlex.join(resume_command(type(setting.options), state, setting.accelerator.num_processes)))
    if secrets := secrets_given(type(setting.options)):
        log.warning("It is shown without %s; add what was given there.", " and ".join(secrets))
    raise SystemExit(128 + (stop.signal or 0))
