"""Say how much of a dataset is cached already, without loading a model."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from library.dataset.cache_folders import locked_folders, report_locked
from library.dataset.cache_stamps import CacheReport
from library.dataset.dataset import Dataset
from library.dataset.findings import Findings, Kind
from library.dataset.latent_cache import latent_files_to_write, survey_latents
from library.dataset.latent_encoder import LatentEncoder
from library.dataset.preflight import Checked
from library.dataset.text_cache import survey_text_outputs, text_files_to_write
from library.dataset.text_encoder import TextEncoder
from library.models.family import Family
from library.models.prompt_weights import PromptStyle
from library.options.errors import UserError
from library.options.scripts import TrainingOptions
from library.training.accelerator import DTypes


def survey_caches(options: TrainingOptions, checked: Checked, family: Family) -> list[dict[str, Any]]:
    """Look through the caches that the options ask for on the disk.

    Args:
        options: of the run.
        checked: the dataset; its findings receive what keeps caches from being made.
        family: of the base model, opened.

    Returns:
        For latents and captions, where they are cached on the disk: what is there and what is to be made, and why.
    """
    cache, dataset = options.cache, checked.dataset
    reports: list[CacheReport] = []
    if cache.cache_latents_to_disk:
        try:
            reports.append(survey_latents(dataset, family, _latent_encoder(options, dataset, family), cache))
        except UserError as error:
            checked.findings.error(Kind.CACHE, "latents", str(error))
    if cache.text is not None and cache.text.cache_text_encoder_outputs_to_disk:
        texts = _text_encoder(options, family)
        reports.append(survey_text_outputs(dataset, texts, cache.text, trust_foreign=family.trusts_foreign_text_caches()))
    return _facts(reports)


def check_cache_folders(options: TrainingOptions, dataset: Dataset, family: Family, findings: Findings) -> None:
    """Note folders that caches have to be written to and cannot be; where all entries are right, nothing has to be.

    Args:
        options: of the run.
        dataset: whose images are in these folders.
        family: of the base model, opened.
        findings: receive an error for each folder.
    """
    cache = options.cache
    caches_texts = cache.text is not None and cache.text.cache_text_encoder_outputs_to_disk
    if not (cache.cache_latents_to_disk or caches_texts):
        return
    locked = locked_folders(dataset)
    if locked and cache.cache_latents_to_disk:
        try:
            encoder = _latent_encoder(options, dataset, family)
            report_locked(findings, "latents", latent_files_to_write(dataset, family, encoder, cache, locked))
        except UserError as error:
            findings.error(Kind.CACHE, "latents", str(error))
    if locked and cache.text is not None and caches_texts:
        trusted = family.trusts_foreign_text_caches()
        files = text_files_to_write(dataset, _text_encoder(options, family), cache.text, locked, trust_foreign=trusted)
        report_locked(findings, "text outputs", files)


def _latent_encoder(options: TrainingOptions, dataset: Dataset, family: Family) -> LatentEncoder:
    dtype = DTypes.of(options.precision, options.precision.no_half_vae, None).vae
    posterior = options.cache.cache_latents_posterior
    return LatentEncoder(family, _not_loaded, torch.device("cpu"), dtype, dataset.seed, posterior=posterior)


def _text_encoder(options: TrainingOptions, family: Family) -> TextEncoder:
    dtype = DTypes.of(options.precision, options.precision.no_half_vae, None).compute
    length = options.model.max_token_length or 75
    style = PromptStyle.of_training(length) if options.caption.weighted_captions else None
    return TextEncoder(family, _not_loaded, torch.device("cpu"), dtype, length, style=style)


def _facts(reports: Sequence[CacheReport]) -> list[dict[str, Any]]:
    return [
        {
            "kind": report.kind,
            "right": report.kept,
            "foreign": report.foreign,
            "to_make": dict(report.made),
            "sentence": report.survey_sentence(),
        }
        for report in reports
    ]


def _not_loaded() -> NoReturn:
    raise AssertionError("a report loads no model")
