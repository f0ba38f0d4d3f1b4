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
from library.options.dataset_config import DatasetConfig, load_dataset_config
from library.options.entry import run_script
from library.options.errors import problems_of
from library.options.groups.cache import CacheOptions
from library.options.parse import parse
from library.options.scripts import CacheLatentsOptions


def main(argv: Sequence[str]) -> None:
    """Check the options and the dataset definition, then cache."""
    options = parse(CacheLatentsOptions, argv, lambda options: problems_of(lambda: dataset_definition(options)))
    set_up_logging(options.console)
    cache(options, dataset_definition(options))


def dataset_definition(options: CacheLatentsOptions) -> DatasetConfig:
    """Read and check `--dataset_config`, or the folders given in its place."""
    return load_dataset_config(
        options.dataset,
        options.caption,
        options.image,
        cache_options(options),
        validation=options.validation,
        masked_loss=options.loss.masked_loss,
    )


def cache_options(options: CacheLatentsOptions) -> CacheOptions:
    """Return the caching options with what this tool is for switched on, and text caching, which is not its business, off."""
    wanted = {"cache_latents": True, "cache_latents_to_disk": True}
    unwanted = {"cache_text_encoder_outputs": False, "cache_text_encoder_outputs_to_disk": False}
    return options.cache.model_copy(update=wanted | unwanted)


def cache(options: CacheLatentsOptions, definition: DatasetConfig) -> None:
    """Open the model, index the images, and encode what is not cached."""
    from library.dataset.dataset import Dataset
    from library.models.sdxl.family import SdxlFamily
    from library.training.accelerator import DTypes, make_accelerator
    from library.training.preparation import fill_latents, model_source

    family = SdxlFamily.open(model_source(options.model, options.precision))
    accelerator = make_accelerator(options.precision, options.distributed)
    dataset = Dataset(definition, options.length.seed or 0)  # not a random one: two runs make the same latents
    dtype = DTypes.of(options.precision, options.precision.no_half_vae, None).vae
    load = functools.cache(lambda: family.load_vae(dtype, accelerator.device))
    fill_latents(dataset, family, load, dtype, cache_options(options), accelerator)


if __name__ == "__main__":
    run_script(main)
