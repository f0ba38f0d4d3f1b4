"""Look at the data of a run instead of training: no model is loaded, and no accelerator is needed."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from library.dataset.batch_pictures import TEXTS, write_batches
from library.dataset.dataset import Dataset
from library.dataset.report import write_report
from library.models.family import Family, ModelSource
from library.options.dataset_config import DatasetConfig
from library.options.scripts import TrainingOptions
from library.training.cache_survey import survey_caches
from library.training.outputs import RunLength
from library.training.preflight import checked_dataset
from library.training.preparation import model_source

log = logging.getLogger(__name__)


def only_looks(options: TrainingOptions) -> bool:
    """Say whether the data is to be looked at instead of training."""
    return options.preflight.dataset_report is not None or options.dataset.debug_dataset


def look(
    open_family: Callable[[ModelSource], Family], options: TrainingOptions, data: DatasetConfig, saved_seed: int | None
) -> None:
    """Check the dataset and write what was asked for; of several processes, the first does.

    Args:
        open_family: opens the base model.
        options: of the run.
        data: the dataset definition, checked.
        saved_seed: of the run that is resumed; used where none is given.

    Raises:
        UserError: the dataset has errors; the report, which has them too, is written before.
    """
    if int(os.environ.get("RANK", "0")):
        return
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    seed = next((given for given in (options.length.seed, saved_seed) if given is not None), 0)
    family = open_family(model_source(options.model, options.precision))
    folder = options.preflight.dataset_report
    checked = checked_dataset(options, data, seed, family, num_processes, compares_all=folder is not None)
    lengths = run_lengths(options, checked.dataset.batches_per_epoch(num_processes), num_processes)
    if folder is not None:
        caches = survey_caches(options, checked, family)
        log.info("The report is in %s.", write_report(folder, checked, lengths, caches))
    checked.findings.raise_errors()
    if warnings := checked.findings.warning_text():
        log.warning("%s", warnings)
    if options.dataset.debug_dataset:
        show_batches(options, checked.dataset, lengths)


def show_batches(options: TrainingOptions, dataset: Dataset, lengths: Mapping[str, int]) -> None:
    """Write the first batches into `debug_dataset` in the output folder, with captions as they are while training."""
    folder = Path(options.output.output_dir or ".") / "debug_dataset"
    if options.cache.text is not None:
        dataset.text_variants = options.cache.text.text_cache_variants
    written = write_batches(
        folder,
        dataset,
        num_processes=lengths["processes"],
        accumulation=lengths["gradient_accumulation_steps"],
        total_updates=lengths["total_updates"],
    )
    log.info("The first %d batches are in %s: pictures, and their captions in %s.", written, folder, TEXTS)


def run_lengths(options: TrainingOptions, batches_per_epoch: int, num_processes: int) -> dict[str, int]:
    """Return how long the run would be, by name; without images only what needs none."""
    times = options.length
    known = {"processes": num_processes, "gradient_accumulation_steps": times.gradient_accumulation_steps}
    if not batches_per_epoch:
        return known
    length = RunLength.of(batches_per_epoch, times.gradient_accumulation_steps, times.max_train_steps, times.max_train_epochs)
    return known | {
        "batches_per_epoch": batches_per_epoch,
        "updates_per_epoch": length.updates_per_epoch,
        "epochs": length.num_epochs,
        "total_updates": length.total_updates,
    }
