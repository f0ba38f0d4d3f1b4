"""Say how much of a dataset is cached already, without loading a model."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from library.dataset.cache_stamps import CacheReport
from library.dataset.findings import Kind
from library.dataset.latent_cache import survey_latents
from library.dataset.latent_encoder import LatentEncoder
from library.dataset.preflight import Checked
from library.dataset.text_cache import survey_text_outputs
from library.dataset.text_encoder import TextEncoder
from library.models.family import Family
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
    dtypes = DTypes.of(options.precision, options.precision.no_half_vae, None)
    reports: list[CacheReport] = []
    if cache.cache_latents_to_disk:
        posterior = cache.cache_latents_posterior
        encoder = LatentEncoder(family, _not_loaded, torch.device("cpu"), dtypes.vae, dataset.seed, posterior=posterior)
        try:
            reports.append(survey_latents(dataset, family, encoder, cache))
        except UserError as error:
            checked.findings.error(Kind.CACHE, "latents", str(error))
    if cache.text is not None and cache.text.cache_text_encoder_outputs_to_disk:
        texts = TextEncoder(family, _not_loaded, torch.device("cpu"), dtypes.compute, options.model.max_token_length or 75)
        reports.append(survey_text_outputs(dataset, texts, cache.text, trust_foreign=family.trusts_foreign_text_caches()))
    return _facts(reports)


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
