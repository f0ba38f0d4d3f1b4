"""From checked options to a finished run: the verbs every training script shares, in the order they are carried out.

A script hands over a `Recipe`: what is trained, and what a saved file says about itself. Everything else is here, once.
"""

import logging
import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from library.generation.request import ImageRequest
from library.models.family import Family, ModelSource
from library.optim.eval_mode import averaged_weights
from library.options.dataset_config import DatasetConfig
from library.options.scripts import TrainingOptions
from library.training.building import Recipe, build_step, make_setting, report
from library.training.compiling import compile_denoiser
from library.training.denoiser import arrange_denoiser, load_denoiser
from library.training.dry_run import dry_run
from library.training.events import events_of_run
from library.training.fitting import Forecasts, fit, with_options
from library.training.forecast_beside import ForecastBeside
from library.training.hub import open_uploads
from library.training.identity import Identity, check_same_run, identity_of
from library.training.interrupt import StopRequest
from library.training.logs import TrainingLog
from library.training.looking import look, only_looks
from library.training.loop import TrainingRun, train
from library.training.observing import add_observers, tell_start
from library.training.out_of_memory import Resident, telling_of_memory
from library.training.outputs import SavePlan
from library.training.position import Position
from library.training.preparation import prepare_latents, prepare_text
from library.training.resume import saved_place, start_position
from library.training.resume_command import resume_command, secrets_given
from library.training.saving import Saver
from library.training.setting import Setting, Trained
from library.training.sharding import divided
from library.training.state import TRAIN_STATE, Resumable, SavedPlace, load_state
from library.training.state_files import refuse_damaged
from library.training.step import ModelParts
from library.training.trained_table import report_trained
from library.training.trouble import add_guard

log = logging.getLogger(__name__)


def run_recipe(
    recipe: Recipe,
    open_family: Callable[[ModelSource], Family],
    options: TrainingOptions,
    data: DatasetConfig,
    requests: Sequence[ImageRequest],
) -> None:
    """Carry out a training run, look at its data (`--dataset_report`, `--debug_dataset`), or say what it will be (`--dry_run`).

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
    if options.forecast.only_forecasts:
        dry_run(recipe, open_family, options, data, requests, saved)
        return
    with events_of_run(options.logging.log_events) as events, telling_of_memory(options) as resident:
        setting = make_setting(open_family, options, data, saved.seed if saved else None, events)
        picked, forecast = fit(options, Forecasts(recipe, setting, requests), saved)
        recipe, setting = with_options(recipe, picked), replace(setting, options=picked)
        beside = ForecastBeside.of_run(recipe, open_family, requests, setting, forecast)
        carry_out(recipe, setting, saved, requests, resident, beside)


def carry_out(
    recipe: Recipe,
    setting: Setting,
    saved: SavedPlace | None,
    requests: Sequence[ImageRequest],
    resident: Resident,
    beside: ForecastBeside,
) -> None:
    """Load the model, make its parts trainable, and train; see `run_recipe`.

    Args:
        recipe: of the script.
        setting: of the run.
        saved: where the resumed state stood, if any.
        requests: sample prompts.
        resident: learns what lies in memory.
        beside: the forecast of its memory.
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
    run, saver = build_run(recipe, setting, trained, parts, identity)
    resident.parts, resident.saver = parts, saver
    resident.batch_size = max(section.config.batch_size for section in setting.dataset.sections)
    report(setting)
    report_trained(setting, trained, saver.live.optimizer.defaults, start.update)
    training_log = add_observers(
        run, saver, setting, trained, parts, text, requests, tracker_name=recipe.tracker_name, start=start, beside=beside
    )
    if uploads is not None:
        saver.after_save.append(uploads.add)
    try:
        if saved is not None:
            load_saved(saved, saver, training_log)
        compile_denoiser(setting, run, trained, denoiser)  # with the scales that saved networks have
        tell_start(setting, start)
        with uploads or nullcontext(), StopRequest() as stop:  # what is uploaded in the end, one Ctrl+C interrupts
            if uploads is not None:
                uploads.is_stopping = lambda: stop.signal is not None
            end = train(run, start, stop)
            if stop.agreed and end.update < run.max_updates:
                stop_saved(saver, end, stop, setting)
    finally:
        training_log.close()


def load_saved(saved: SavedPlace, saver: Saver, training_log: TrainingLog) -> None:
    """Take up the state of the run that is resumed, with its averages of the loss."""
    load_state(saved.folder, saver.live)
    if saved.losses:
        try:
            training_log.losses.load_state_dict(saved.losses)
        except (KeyError, TypeError, ValueError) as error:
            refuse_damaged(saved.folder / TRAIN_STATE, f"its losses cannot be read ({error!r})")


def build_run(
    recipe: Recipe, setting: Setting, trained: Trained, parts: ModelParts, identity: Identity
) -> tuple[TrainingRun, Saver]:
    """Build optimizer, schedule, step, loader and saver: everything the loop needs but those who look on."""
    options, swaps = setting.options, setting.options.precision.swaps_blocks
    run, engine, optimizer = build_step(setting, trained, parts)
    saver = Saver(
        plan=SavePlan.of(setting.options.output, setting.options.state, trained.extension, setting.length.num_epochs),
        trainable=trained.trainable,
        live=Resumable(
            trained.trainable.module,
            engine.optimizer,
            run.schedule,
            setting.accelerator.scaler,
            state_on=setting.accelerator.device if swaps and options.optimizer.optimizer_states != "host" else None,
        ),
        dtype=setting.dtypes.saved,
        metadata=recipe.metadata(setting, trained),
        averaged=lambda: averaged_weights(optimizer),
        writes=setting.accelerator.is_main_process,
        seed=setting.seed,
        batches_per_epoch=setting.batches_per_epoch,
        identity=identity,
    )
    add_guard(run, saver, setting, trained, optimizer)
    return run, saver


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
