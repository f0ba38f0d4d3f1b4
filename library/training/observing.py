"""Who looks on while a run trains: the log, the validation, the sample images and the saver, in the order they are called."""

import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from library.generation.additions import ControlFile
from library.generation.controls import Controls
from library.generation.pipeline import Pipeline
from library.generation.request import ImageRequest
from library.models.family import Components
from library.optim.gradient_norms import GradientNorms
from library.options.disclosure import loggable_config
from library.training.ema import moving_average
from library.training.events import SCHEMA_VERSION
from library.training.forecast_beside import ForecastBeside
from library.training.identity import identity_of
from library.training.inputs import sample_requests
from library.training.loader import make_loader
from library.training.logs import Gauges, TrainingLog, on_one_device
from library.training.loop import TrainingRun
from library.training.loss_ledger import LossLedger
from library.training.manifest import Manifest, run_facts
from library.training.paging import PagingWatch
from library.training.peak_memory import PeakMemory, is_measured
from library.training.position import Position
from library.training.preparation import TextSide
from library.training.preview_plan import PreviewPlan
from library.training.previews import Drawn, EncodedTexts, Previews, PromptFile
from library.training.progress import Progress
from library.training.saving import Saved, Saver
from library.training.scalar_names import SCALAR_NAMES, group_names
from library.training.setting import Setting, Trained, beside_output
from library.training.step import ModelParts
from library.training.step_meter import StepMeter
from library.training.trackers import RunLog
from library.training.validation import Validation, ValidationPlan, validation_timesteps

log = logging.getLogger(__name__)


def add_observers(
    run: TrainingRun,
    saver: Saver,
    setting: Setting,
    trained: Trained,
    parts: ModelParts,
    text: TextSide,
    requests: Sequence[ImageRequest],
    *,
    tracker_name: str,
    start: Position,
    beside: ForecastBeside | None = None,
) -> TrainingLog:
    """Give a run everyone who looks on, and the saver the log's averages for its states.

    Args:
        run: gains its observers.
        saver: comes after all who change something, so that what they did with an update is in what it saves.
        setting: of the run.
        trained: what is trained.
        parts: the model.
        text: holds the encoded sample prompts.
        requests: sample prompts; empty where no sample images are drawn.
        tracker_name: project name in trackers, unless another is given.
        start: where the run starts.
        beside: the forecast of its memory.

    Returns:
        The log, to be closed when the run is over.
    """
    trackers = open_trackers(tracker_name, setting)
    meter = StepMeter(setting.accelerator.device)
    training_log = TrainingLog(
        trackers,
        Progress(setting.length.total_updates, start.update, visible=setting.accelerator.is_main_process),
        lambda: saver.live.optimizer.param_groups,
        trained.descriptions,
        gauges(setting, trained, run, saver),
        SCALAR_NAMES[tracker_name],
        trained.trains_text,
        setting.events,
        meter,
    )
    run.observe_loss, saver.losses = training_log.observe_loss, training_log.state_dict
    saver.after_save.append(lambda saved: tell_saved(setting, saved))
    peak = peak_memory(setting, beside or ForecastBeside(None))
    run.observers = [
        *run.observers,
        *peak,
        *moving_average(setting, trained, saver),
        training_log,
        *paging_watch(setting, meter),
        *validation(setting, trained, saver.averaged, run, training_log, trackers),
        *previews(setting, trained, saver.averaged, parts, text, requests, trackers),
        saver,
        *write_manifest(setting, trained, saver, start, peak),
        *loss_ledger(setting, run),
        meter,
    ]
    return training_log


def gauges(setting: Setting, trained: Trained, run: TrainingRun, saver: Saver) -> Callable[[], Gauges]:
    """Return what is asked after each update for norms of weights, and of gradients where that was asked for."""
    if not setting.options.logging.log_grad_norm:
        return lambda: trained.trainable.norms
    groups = saver.live.optimizer.param_groups
    measuring = run.updater.gradient_norms = GradientNorms(groups)
    names = [f"grad_norm/{name}" for name in group_names(trained.descriptions, len(groups))]

    def read() -> Gauges:
        norms = measuring.take()
        whole = on_one_device(norms).norm()
        return {**trained.trainable.norms, **dict(zip(names, norms, strict=True)), "grad_norm/all": whole}

    return read


def paging_watch(setting: Setting, meter: StepMeter) -> list[PagingWatch]:
    """Return the observer that warns when a full GPU becomes slow; in each process that has one."""
    device = setting.accelerator.device
    return [PagingWatch(meter, device)] if device.type == "cuda" else []


def peak_memory(setting: Setting, beside: ForecastBeside) -> list[PeakMemory]:
    """Return the observer that measures what a GPU needs, and tells it at the end, in the main process."""
    device = setting.accelerator.device
    if not is_measured(device):
        return []
    peak = PeakMemory(device, beside, setting.events)
    if setting.accelerator.is_main_process:
        setting.events.at_end.append(peak.ended)
    return [peak]


def write_manifest(
    setting: Setting, trained: Trained, saver: Saver, start: Position, peak: Sequence[PeakMemory] = ()
) -> list[Manifest]:
    """Return the observer that writes the run's manifest, in the main process."""
    if not setting.accelerator.is_main_process:
        return []
    facts = run_facts(setting, trained, start, dict(saver.identity or identity_of(setting)))
    manifest = Manifest(
        beside_output(setting, "run.json"),
        facts,
        continues=setting.options.state.resume is not None,
        memory=peak[0].figures if peak else lambda: None,
    )
    saver.after_save.append(manifest.saved)
    setting.events.at_end.append(manifest.ended)
    return [manifest]


def tell_start(setting: Setting, start: Position) -> None:
    """Write the event that training begins; models are loaded and caches made by then."""
    options, length = setting.options, setting.length
    setting.events.write(
        "start",
        version=SCHEMA_VERSION,
        script=options.script,
        step=start.update,
        epoch=start.epoch,
        total_steps=length.total_updates,
        epochs=length.num_epochs,
        batches_per_epoch=setting.batches_per_epoch,
        accumulation=options.length.gradient_accumulation_steps,
        processes=setting.accelerator.num_processes,
        device=str(setting.accelerator.device),
        seed=setting.seed,
        output_dir=options.output.output_dir,
        output_name=options.output.output_name,
        resumed_from=options.state.resume,
        manifest=beside_output(setting, "run.json"),
    )


def tell_saved(setting: Setting, saved: Saved) -> None:
    """Write the event that a model or a state is complete on disk."""
    setting.events.write("saved", step=saved.position.update, what=saved.what, occasion=saved.kind, path=saved.path)


def open_trackers(tracker_name: str, setting: Setting) -> RunLog:
    """Start the trackers; only the main process has any."""
    if not setting.accelerator.is_main_process:
        return RunLog()
    options = setting.options
    config = loggable_config(options) if options.logging.log_config else None
    return RunLog.open(options.logging, tracker_name, config, datetime.fromtimestamp(setting.started_at))


def loss_ledger(setting: Setting, run: TrainingRun) -> list[LossLedger]:
    """Return the observer that keeps the loss of every image, or nothing where that was not asked for."""
    options, accelerator = setting.options, setting.accelerator
    if not options.logging.loss_ledger:
        return []
    ledger = LossLedger(
        beside_output(setting, "losses.csv"),
        gather_object,
        writes=accelerator.is_main_process,
        continues=options.state.resume is not None,
    )
    accelerator.unwrap_model(run.step).observe = ledger.observe
    setting.events.at_end.append(lambda end: ledger.stopped() if end.outcome == "stopped" else None)
    return [ledger]


def validation(
    setting: Setting,
    trained: Trained,
    averaged: Callable[[], Any],
    run: TrainingRun,
    training_log: TrainingLog,
    trackers: RunLog,
) -> list[Validation]:
    """Return the observer that measures the loss on held-out images, or nothing where none are held out."""
    options, accelerator = setting.options.validation, setting.accelerator
    if not setting.dataset.held_out:
        if given := [f"--{name}" for name, value in options if value != type(options).model_fields[name].default]:
            log.warning(
                "No images are held out, so %s has no effect. Set validation_split, for example to 0.1; a folder needs two images.",
                ", ".join(given),
            )
        return []
    loader = make_loader(setting, persistent=False)
    return [
        Validation(
            plan=ValidationPlan.of(options),
            batches=lambda: loader.held_out(options.max_validation_steps),
            step=accelerator.unwrap_model(run.step),
            timesteps=validation_timesteps(*setting.objective.trained_timesteps),
            seed=setting.seed if options.validation_seed is None else options.validation_seed,
            accelerator=accelerator,
            trainable=trained.trainable,
            averaged=averaged,
            training_loss=training_log.average,
            trackers=trackers,
            events=setting.events,
            num_datasets=len(setting.dataset.sections),
        )
    ]


def previews(
    setting: Setting,
    trained: Trained,
    averaged: Callable[[], Any],
    parts: ModelParts,
    text: TextSide,
    requests: Sequence[ImageRequest],
    trackers: RunLog,
) -> list[Previews]:
    """Return the observer that draws sample images, or nothing where none are wanted."""
    if not requests or parts.vae is None:
        return []
    options, accelerator = setting.options, setting.accelerator
    pipeline = Pipeline(
        setting.family,
        Components(parts.denoiser, parts.vae, parts.text_encoders),
        device=accelerator.device,
        prediction_type="v_prediction" if setting.objective.prediction == "v" else "epsilon",
        zero_terminal_snr=setting.objective.zero_terminal_snr,
        style=setting.prompt_style,
        autocast_dtype=setting.autocast_dtype,
        controls=None if trained.control is None else Controls([trained.control], [ControlFile("")]),
    )
    return [
        Previews(
            plan=PreviewPlan.of(options.sample),
            prompts=PromptFile(
                Path(options.sample.sample_prompts or ""),
                lambda: sample_requests(options, setting.dataset.config.sections[0].resolution),
                requests,
            ),
            pipeline=pipeline,
            encoded=None if text.prompts is None else EncodedTexts(requests, text.prompts),
            vae=parts.vae,
            trainable=trained.trainable,
            averaged=averaged,
            folder=Path(options.output.output_dir or "."),
            output_name=options.output.output_name,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            gather=gather_object,
            show=lambda position, drawn: show_samples(setting, trackers, position, drawn),
        )
    ]


def show_samples(setting: Setting, trackers: RunLog, position: Position, drawn: Sequence[Drawn]) -> None:
    """Tell trackers and events of sample images; before the first step nothing else would make trackers send them off."""
    for each in drawn:
        trackers.sample(each.index, each.path, each.prompt)
        setting.events.write("sample", step=position.update, index=each.index, path=each.path, prompt=each.prompt, seed=each.seed)
    if position.update == 0:
        trackers.step({}, 0, position.epoch)
