"""Between the options and the loop: what can be encoded once is encoded once, and what is not needed any more is freed.

Models are loaded when something has to be encoded with them: where every cache entry is right, they never are.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from library.dataset.cache_stamps import CacheReport
from library.dataset.dataset import Dataset
from library.dataset.foreign import ForeignDataset
from library.dataset.latent_cache import cache_latents
from library.dataset.latent_encoder import LatentEncoder
from library.dataset.text_cache import cache_text_outputs
from library.dataset.text_encoder import TextEncoder
from library.generation.pipeline import EncodedPrompt, Pipeline
from library.generation.request import ImageRequest
from library.models.family import Components, Family, ModelSource
from library.models.prompt_weights import PromptStyle
from library.options.groups.cache import CacheOptions, LatentCacheOptions
from library.options.groups.model import ModelOptions
from library.options.groups.precision import VaePrecisionOptions, WorkingPrecisionOptions
from library.training.progress import bar_interval, messages_above_bars
from library.training.setting import PartDTypes, Setting

log = logging.getLogger(__name__)


@dataclass
class TextSide:
    """What is left of the text encoders."""

    encoders: list[nn.Module | None]
    """On the device where captions are encoded while training; all None where everything is cached."""
    prompts: list[EncodedPrompt] | None
    """The sample prompts' text, where the encoders are gone."""


def model_source(model: ModelOptions, precision: WorkingPrecisionOptions) -> ModelSource:
    """Say where the base model is and how its files are read."""
    return ModelSource(
        path=model.pretrained_model_name_or_path or "",
        vae=model.vae,
        mmap=not model.disable_mmap_load_safetensors,
        prefer_fp16_variant=precision.mixed_precision == "fp16",
        keep_vae_precision=isinstance(precision, VaePrecisionOptions) and precision.no_half_vae,
        tile_vae=isinstance(precision, VaePrecisionOptions) and precision.vae_tiling,
        tokenizer_cache_dir=model.tokenizer_cache_dir,
        max_token_length=model.max_token_length or 75,
    )


def keeps_text_encoders(setting: Setting) -> bool:
    """Say whether captions are encoded while training."""
    return setting.options.cache.text is None and not setting.dataset.brings_texts


def encodes_images(setting: Setting) -> bool:
    """Say whether images are encoded while training."""
    return not (caches_latents(setting) or setting.dataset.brings_latents)


def caches_latents(setting: Setting) -> bool:
    """Say whether images are encoded before training."""
    return setting.options.cache.cache_latents or setting.options.cache.cache_latents_to_disk


def prepare_text(setting: Setting, requests: Sequence[ImageRequest], dtypes: PartDTypes) -> TextSide:
    """Load the text encoders, or cache what captions and sample prompts need of them and free them.

    Where text outputs come with the batches, sample prompts alone need text encoders.

    Args:
        setting: of the run; its dataset gets the cached text.
        requests: the sample prompts.
        dtypes: of the text encoders, and what they hold.
    """
    options, accelerator, family = setting.options, setting.accelerator, setting.family
    dtype = dtypes.text_encoders
    if keeps_text_encoders(setting):
        return TextSide([*family.load_text_encoders(dtype, accelerator.device, dtypes.hold_text_encoders)], None)
    load = cache(lambda: list[nn.Module | None](family.load_text_encoders(dtype, accelerator.device)))
    if options.cache.text is not None:
        batch_size, style = options.dataset.train_batch_size, setting.caption_style
        fill_texts(setting.dataset, family, load, dtype, options.model, options.cache.text, accelerator, batch_size, style)
    prompts: list[EncodedPrompt] = []
    if requests:
        prompts = Pipeline(
            family,
            Components(None, None, load()),
            device=accelerator.device,
            style=setting.prompt_style,
            autocast_dtype=setting.autocast_dtype,
        ).encode(requests)
    load.cache_clear()
    free_memory()
    return TextSide([None] * len(family.encoder_names), prompts)


def prepare_latents(setting: Setting, *, keep: bool) -> nn.Module | None:
    """Load the VAE, or cache the latents that need it; where latents come with the batches, only sample images do.

    Args:
        setting: of the run; its dataset gets the cached latents.
        keep: whether the VAE is wanted afterwards, to draw sample images.

    Returns:
        The VAE: on the device where images are encoded while training, on the CPU where it only draws (on the device with
        `--lowram`), or None.
    """
    options, accelerator, family = setting.options, setting.accelerator, setting.family
    dtype = setting.dtypes.vae
    load = cache(lambda: family.load_vae(dtype, accelerator.device))
    tell_of_tiles(setting.dataset, family, options.precision)
    if encodes_images(setting):
        return load()
    if caches_latents(setting):
        fill_latents(setting.dataset, family, load, dtype, options.cache, accelerator)
    if keep and options.model.lowram:
        return load()
    vae = None
    if keep:  # it is not put on the device only to be taken away again
        vae = load().to("cpu") if load.cache_info().currsize else family.load_vae(dtype, torch.device("cpu"))
    load.cache_clear()
    free_memory()
    return vae


def tell_of_tiles(dataset: Dataset, family: Family, precision: VaePrecisionOptions) -> None:
    """Say where `--vae_tiling` does nothing because no picture is large enough."""
    if not precision.vae_tiling or isinstance(dataset, ForeignDataset):  # of whose pictures little is known beforehand
        return
    if max((side for _, bucket in dataset.buckets for side in bucket), default=0) <= family.vae_tile:
        log.warning(
            "--vae_tiling has no effect on the training images: none has a side above %d pixels.",
            family.vae_tile,
        )


def fill_texts(
    dataset: Dataset,
    family: Family,
    load: Callable[[], Sequence[nn.Module | None]],
    dtype: torch.dtype,
    model: ModelOptions,
    options: CacheOptions,
    accelerator: Accelerator,
    batch_size: int,
    style: PromptStyle | None,
) -> None:
    """Give the dataset its cached text outputs; returns when all processes are done.

    Args:
        dataset: whose captions are encoded.
        family: of the text encoders.
        load: gives the text encoders; called if there is something to encode.
        dtype: of the text encoders.
        model: which, and to what length captions are cut.
        options: memory or disk.
        accelerator: knows the processes that share the work.
        batch_size: captions per call of the encoders.
        style: how brackets weigh the tokens between them; None reads brackets as text.
    """
    encoder = TextEncoder(family, load, accelerator.device, dtype, model.max_token_length or 75, batch_size, style)
    on_disk = options.cache_text_encoder_outputs_to_disk
    with caching_bar("captions", accelerator, is_shared=on_disk) as progress:
        report = cache_text_outputs(
            dataset,
            encoder,
            options,
            trust_foreign=family.trusts_foreign_text_caches(),
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            progress=progress,
        )
    _tell(report, accelerator, is_shared=on_disk)


def fill_latents(
    dataset: Dataset,
    family: Family,
    load: Callable[[], nn.Module],
    dtype: torch.dtype,
    options: LatentCacheOptions,
    accelerator: Accelerator,
) -> None:
    """Give the dataset its cached latents; returns when all processes are done.

    Args:
        dataset: whose images are encoded.
        family: of the VAE.
        load: gives the VAE; called if there is something to encode.
        dtype: of the VAE.
        options: memory or disk.
        accelerator: knows the processes that share the work.
    """
    encoder = LatentEncoder(
        family,
        load,
        accelerator.device,
        dtype,
        dataset.seed,
        batch_size=options.vae_batch_size,
        keep_device_memory=options.highvram,
        posterior=options.cache_latents_posterior,
    )
    with caching_bar("latents", accelerator, is_shared=options.cache_latents_to_disk) as progress:
        report = cache_latents(
            dataset,
            family,
            encoder,
            options,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            progress=progress,
        )
    _tell(report, accelerator, is_shared=options.cache_latents_to_disk)


def _tell(report: CacheReport, accelerator: Accelerator, *, is_shared: bool) -> None:
    """Wait for all processes and log what they did together; each alone has done everything where nothing is shared."""
    accelerator.wait_for_everyone()
    total = CacheReport.sum(gather_object([report])) if is_shared else report
    log.info("%s", total.sentence())
    if total.foreign:
        log.warning("%s", total.foreign_sentence())


@contextmanager
def caching_bar(what: str, accelerator: Accelerator, *, is_shared: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on the main process; gives the function that moves it.

    Args:
        what: is cached.
        accelerator: knows the processes.
        is_shared: whether each process does a part; the bar shows that of the first.
    """
    count = accelerator.num_processes
    name = f"caching {what}" + (f" (process 1 of {count})" if is_shared and count > 1 else "")
    visible = accelerator.is_local_main_process
    with messages_above_bars(), tqdm(desc=name, disable=not visible, mininterval=bar_interval()) as bar:

        def progress(done: int, total: int) -> None:
            if bar.total != total:
                bar.reset(total)
            bar.update(done - bar.n)

        yield progress


def free_memory() -> None:
    """Give memory of dropped models back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
