"""Between the options and the loop: what can be encoded once is encoded once, and what is not needed any more is freed."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from library.dataset.latent_cache import cache_latents
from library.dataset.latent_encoder import LatentEncoder
from library.dataset.text_cache import cache_text_outputs
from library.dataset.text_encoder import TextEncoder
from library.generation.pipeline import EncodedPrompt, Pipeline
from library.generation.request import ImageRequest
from library.models.family import Components
from library.training.progress import bar_interval, messages_above_bars
from library.training.setting import Setting


@dataclass
class TextSide:
    """What is left of the text encoders."""

    encoders: list[nn.Module | None]
    """On the device where captions are encoded while training; all None where everything is cached."""
    prompts: list[EncodedPrompt] | None
    """The sample prompts' text, where the encoders are gone."""


def prepare_text(setting: Setting, requests: Sequence[ImageRequest], dtype: torch.dtype) -> TextSide:
    """Load the text encoders; where captions are cached, encode captions and sample prompts now and free the encoders.

    Args:
        setting: of the run; its dataset gets the cached text.
        requests: the sample prompts.
        dtype: of the text encoders.
    """
    options, accelerator, family = setting.options, setting.accelerator, setting.family
    encoders: list[nn.Module | None] = list(family.load_text_encoders(dtype, accelerator.device))
    if not (options.cache.cache_text_encoder_outputs or options.cache.cache_text_encoder_outputs_to_disk):
        return TextSide(encoders, None)
    encoder = TextEncoder(
        family,
        encoders,
        accelerator.device,
        dtype,
        max_token_length=options.model.max_token_length or 75,
        batch_size=options.dataset.train_batch_size,
    )
    with caching_bar("captions", accelerator) as progress:
        cache_text_outputs(
            setting.dataset,
            encoder,
            options.cache,
            trust_foreign=Path(options.model.pretrained_model_name_or_path or "").is_dir(),
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            progress=progress,
        )
    accelerator.wait_for_everyone()
    pipeline = Pipeline(
        family,
        Components(None, None, encoders),
        device=accelerator.device,
        style=setting.prompt_style,
        autocast_dtype=setting.autocast_dtype,
    )
    prompts = pipeline.encode(requests)
    del encoder, pipeline
    encoders[:] = [None] * len(encoders)
    free_memory()
    return TextSide(encoders, prompts)


def prepare_latents(setting: Setting, *, keep: bool) -> nn.Module | None:
    """Load the VAE and cache latents where that was asked for.

    Args:
        setting: of the run; its dataset gets the cached latents.
        keep: whether the VAE is wanted afterwards, to draw sample images.

    Returns:
        The VAE: on the device where images are encoded while training, on the CPU where it only draws (on the device with
        `--lowram`), or None.
    """
    cache, accelerator, family = setting.options.cache, setting.accelerator, setting.family
    dtype = setting.dtypes.vae
    vae = family.load_vae(dtype, accelerator.device)
    if not (cache.cache_latents or cache.cache_latents_to_disk):
        return vae
    encoder = LatentEncoder(family, vae, accelerator.device, dtype, setting.seed, cache.vae_batch_size, cache.highvram)
    with caching_bar("latents", accelerator) as progress:
        cache_latents(
            setting.dataset,
            family,
            encoder,
            cache,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            progress=progress,
        )
    accelerator.wait_for_everyone()
    if keep:
        return vae if setting.options.model.lowram else vae.to("cpu")
    del encoder, vae
    free_memory()
    return None


@contextmanager
def caching_bar(what: str, accelerator: Accelerator) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on the main process; gives the function that moves it."""
    visible = accelerator.is_local_main_process
    with messages_above_bars(), tqdm(desc=f"caching {what}", disable=not visible, mininterval=bar_interval()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def free_memory() -> None:
    """Give memory of dropped models back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
