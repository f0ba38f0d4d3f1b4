"""Check the data of a run before any model is loaded."""

import logging

from library.dataset.dataset import Dataset
from library.dataset.findings import Findings
from library.dataset.foreign import ForeignDataset
from library.dataset.preflight import Checked, Limits, check_dataset
from library.models.family import Family
from library.options.dataset_config import DatasetConfig
from library.options.errors import UserError
from library.options.scripts import SdxlTrainTextualInversionOptions, TrainingOptions
from library.training.cache_survey import check_cache_folders

log = logging.getLogger(__name__)


def open_dataset(options: TrainingOptions, data: DatasetConfig, seed: int, family: Family, num_processes: int) -> Dataset:
    """List the images of a run and check everything about them that can be known without a model.

    Args:
        options: of the run.
        data: the dataset definition, checked.
        seed: of the run.
        family: of the base model, which is opened, not loaded.
        num_processes: that share each batch.

    Returns:
        The dataset; what is odd about it is logged.

    Raises:
        UserError: names everything that keeps the run from starting.
    """
    if options.dataset.dataset_class is not None:
        arguments = (None, options.model.max_token_length, options.dataset.size, options.dataset.debug_dataset)
        has_network = hasattr(options, "network") or options.follows_images
        dataset = ForeignDataset(
            options.dataset.dataset_class,
            data,
            seed,
            family,
            arguments,
            has_network=has_network,
            follows_images=options.follows_images,
        )
        if dataset.brings_texts:
            _check_frozen_text_encoders(options)
        return dataset
    checked = checked_dataset(options, data, seed, family, num_processes, compares_all=False)
    checked.findings.raise_errors()
    if warnings := checked.findings.warning_text():
        log.warning("%s", warnings)
    return checked.dataset


def checked_dataset(
    options: TrainingOptions, data: DatasetConfig, seed: int, family: Family, num_processes: int, *, compares_all: bool
) -> Checked:
    """List the images of a run and check them; nothing is raised or logged. See `open_dataset`."""
    findings = Findings()
    dataset = Dataset(data, seed, findings)
    weighted = options.caption.weighted_captions
    word = options.word.token_string if isinstance(options, SdxlTrainTextualInversionOptions) else None
    limits = Limits(family.count_tokens, options.model.max_token_length or 75, num_processes, compares_all, weighted, word)
    checked = check_dataset(dataset, findings, limits)
    check_cache_folders(options, dataset, family, findings)
    return checked


def _check_frozen_text_encoders(options: TrainingOptions) -> None:
    """Make sure that no text encoder is to be trained, which needs captions.

    Raises:
        UserError: one is to be.
    """
    for group, flag in (("network", "network_train_text_encoder_only"), ("finetune", "train_text_encoder")):
        if getattr(getattr(options, group, None), flag, False):
            raise UserError(
                f"--{flag} cannot be used: the batches of {options.dataset.dataset_class} bring text_encoder_outputs_list, which "
                "freezes the text encoders. Leave the option out, or let the batches bring captions alone."
            )
    if isinstance(options, SdxlTrainTextualInversionOptions):
        raise UserError(
            f"--dataset_class: the batches of {options.dataset.dataset_class} bring text_encoder_outputs_list, but a new word is "
            "learned from captions. Let them bring captions alone."
        )
