"""Encode the images of a dataset once and keep the latents on disk beside them, for training with --cache_latents_to_disk.

    python tools/cache_latents.py --pretrained_model_name_or_path sdxl.safetensors --dataset_config data.toml --mixed_precision bf16
    accelerate launch tools/cache_latents.py …        # several GPUs share the images

The options of training may stay on the command line; those without influence here do nothing. Entries that are right are kept, so
an interrupted run continues where it stopped.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the project's folder is not on the path

from library.options.console import set_up_logging
from library.options.dataset_config import DatasetConfig
from library.options.entry import run_script
from library.options.errors import problems_of
from library.options.groups.cache import CacheOptions
from library.options.parse import parse
from library.options.scripts import CacheLatentsOptions
from library.training.inputs import dataset_definition


def main(argv: Sequence[str]) -> None:
    """Check the options and the dataset definition, then cache."""
    options = parse(CacheLatentsOptions, argv, lambda given: problems_of(lambda: dataset_definition(given, cache_options(given))))
    set_up_logging(options.console)
    cache(options, dataset_definition(options, cache_options(options)))


def cache_options(options: CacheLatentsOptions) -> CacheOptions:
    """Return the caching options with what this tool is for switched on, and text caching, which is not its business, off."""
    wanted = {"cache_latents": True, "cache_latents_to_disk": True}
    unwanted = {"cache_text_encoder_outputs": False, "cache_text_encoder_outputs_to_disk": False}
    return options.cache.model_copy(update=wanted | unwanted)


def cache(options: CacheLatentsOptions, definition: DatasetConfig) -> None:
    """Open the model, index the images, and encode what is not cached."""
    from library.models.sdxl.family import SdxlFamily
    from library.training.accelerator import DTypes, make_accelerator
    from library.training.caching_tools import open_to_cache
    from library.training.out_of_memory import telling_of_memory_while_caching
    from library.training.preparation import fill_latents, model_source, tell_of_tiles

    family = SdxlFamily.open(model_source(options.model, options.precision))
    accelerator = make_accelerator(options.precision, options.distributed)
    dataset = open_to_cache(options, definition)
    dtype = DTypes.of(options.precision, options.precision.no_half_vae, None).vae
    load = functools.cache(lambda: family.load_vae(dtype, accelerator.device))
    with telling_of_memory_while_caching(options):
        tell_of_tiles(dataset, family, options.precision)
        fill_latents(dataset, family, load, dtype, cache_options(options), accelerator)


if __name__ == "__main__":
    run_script(main)
