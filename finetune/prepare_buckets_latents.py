"""Choose the training size of every image, note it in a metadata file, and encode the images once.

    python finetune/prepare_buckets_latents.py pictures meta.json prepared.json sdxl.safetensors --max_resolution 1024,1024 \\
        --max_bucket_reso 2048 --mixed_precision bf16
    accelerate launch finetune/prepare_buckets_latents.py …        # several GPUs share the images

Every image gets `train_resolution` and `image_size` in its entry, and beside it its latents as `tools/cache_latents.py` writes
them, for training with --in_json, the same sizes, --enable_bucket and --cache_latents_to_disk. Images without an entry get one;
what else is in the file stays. Latents that are right are kept, so an interrupted run continues where it stopped.
"""

import argparse
import functools
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the project's folder is not on the path

from library.options.console import say, set_up_logging
from library.options.entry import run_script
from library.options.errors import UsageError, problems_of
from library.options.groups.console import ConsoleOptions
from library.options.metadata_tools import folder_problems, source_problems, target_problems

if TYPE_CHECKING:
    from library.dataset.dataset import Dataset
    from library.dataset.metadata_edit import Entries
    from library.options.dataset_config import DatasetConfig

logger = logging.getLogger(__name__)

_NO_CAPTION_FILE = "/"
"""An ending that no file has: captions are in the metadata here."""


def main(argv: Sequence[str]) -> None:
    """Prepare what the command line names.

    Raises:
        UsageError: an option or path cannot be used; torch has not been imported then.
        UserError: the metadata, the model or images cannot be read, or the disk is full.
    """
    set_up_logging(ConsoleOptions())
    arguments = read_command_line(argv)
    prepare(arguments, image_definition(arguments))


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("train_data_dir", help="folder of the images")
    add("in_json", help="metadata file to start from")
    add("out_json", help="metadata file to write; may be the same")
    add("model_name_or_path", help="an SDXL checkpoint or diffusers folder, of which the VAE is used")
    add("--max_resolution", default="512,512", help="width,height whose product a training size does not exceed (%(default)s)")
    add("--min_bucket_reso", type=int, default=256, help="shortest side of a training size (%(default)s)")
    add("--max_bucket_reso", type=int, default=1024, help="longest side; 2048 suits 1024,1024 (%(default)s)")
    add("--bucket_reso_steps", type=int, default=64, help="sides are multiples of this, itself a multiple of 32 (%(default)s)")
    add("--bucket_no_upscale", action="store_true", help="never enlarge an image: make its training size from its own")
    add("--batch_size", type=int, default=1, help="images per call of the VAE (%(default)s)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="number type of the VAE (%(default)s)")
    add("--no_half_vae", action="store_true", help="keep the VAE in float32 whatever --mixed_precision says")
    add("--vae", help="a VAE in place of the model's own: a file or a folder")
    add("--flip_aug", action="store_true", help="encode the mirrored images too")
    add("--alpha_mask", default="", metavar="TEXT", help="any text keeps the alpha channel as a mask of the loss")
    add("--skip_existing", action="store_true", help="trust latents that are there without opening them")
    add("--full_path", action="store_true", help="name entries by the image's path instead of its bare name")
    add("--recursive", action="store_true", help="search sub-folders too; needs --full_path")
    add("--max_data_loader_n_workers", type=int, help="not needed: images are always read ahead")
    add("--v2", action="store_true", help="not needed: the model is SDXL")
    return parser


def read_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        UsageError: with everything that is wrong.
    """
    arguments = command_line().parse_args(argv)
    problems = folder_problems(arguments.train_data_dir) + source_problems(arguments.in_json)
    problems += target_problems(arguments.out_json)
    if not os.path.exists(arguments.model_name_or_path):
        problems.append(f"There is no file or folder {arguments.model_name_or_path}. Name an SDXL checkpoint.")
    if arguments.recursive and not arguments.full_path:
        problems.append("--recursive needs --full_path: images in different folders may have the same name. Add it.")
    counts = ("batch_size", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
    wrong = [name for name in counts if getattr(arguments, name) < 1]
    problems += [f"--{name} must be at least 1, not {getattr(arguments, name)}." for name in wrong]
    if not problems:
        problems += problems_of(lambda: image_definition(arguments))
    if problems:
        raise UsageError(problems)
    for name in ("v2", "max_data_loader_n_workers"):
        if getattr(arguments, name):
            logger.info("--%s changes nothing here.", name)
    return arguments


def image_definition(arguments: argparse.Namespace) -> "DatasetConfig":
    """Say in the terms of training how images are sized.

    Raises:
        UsageError: the sizes cannot be trained.
    """
    from library.options.dataset_config import load_dataset_config
    from library.options.groups.cache import CacheOptions
    from library.options.groups.caption import CaptionTextOptions
    from library.options.groups.dataset import DatasetOptions, parse_size
    from library.options.groups.image import ImageOptions

    try:
        parse_size(arguments.max_resolution)
    except ValueError as error:
        raise UsageError([f"--max_resolution {arguments.max_resolution} cannot be used: {error}."]) from None
    return load_dataset_config(
        DatasetOptions(train_data_dir=arguments.train_data_dir, in_json=arguments.in_json, resolution=arguments.max_resolution),
        CaptionTextOptions(),
        ImageOptions(
            enable_bucket=True,
            min_bucket_reso=arguments.min_bucket_reso,
            max_bucket_reso=arguments.max_bucket_reso,
            bucket_reso_steps=arguments.bucket_reso_steps,
            bucket_no_upscale=arguments.bucket_no_upscale,
            flip_aug=arguments.flip_aug,
            alpha_mask=bool(arguments.alpha_mask),
        ),
        CacheOptions(),
    )


def prepare(arguments: argparse.Namespace, definition: "DatasetConfig") -> None:
    """Write the metadata, then encode what is not cached.

    Raises:
        UserError: the metadata, the model or images cannot be read, or the disk is full.
    """
    from library.dataset.dataset import Dataset
    from library.dataset.metadata_edit import images_in, read_entries, write_entries
    from library.models.family import ModelSource
    from library.models.sdxl.family import SdxlFamily
    from library.options.groups.cache import CacheOptions
    from library.options.groups.distributed import ProcessGroupOptions
    from library.options.groups.precision import WorkingPrecisionOptions
    from library.training.accelerator import DTypes, make_accelerator
    from library.training.preparation import fill_latents

    entries = read_entries(arguments.in_json)
    precision = WorkingPrecisionOptions(mixed_precision=arguments.mixed_precision)
    is_half = arguments.mixed_precision == "fp16"
    family = SdxlFamily.open(ModelSource(arguments.model_name_or_path, arguments.vae, prefer_fp16_variant=is_half))
    accelerator = make_accelerator(precision, ProcessGroupOptions())
    images = images_in(arguments.train_data_dir, recursive=arguments.recursive)
    dataset = Dataset(of_folders(definition, images), seed=0)
    if accelerator.is_main_process:
        note_sizes(dataset, entries, full_path=arguments.full_path)
        write_entries(arguments.out_json, entries)
        say(f"Wrote {arguments.out_json}.")
    dtype = DTypes.of(precision, arguments.no_half_vae, None).vae
    load = functools.cache(lambda: family.load_vae(dtype, accelerator.device))
    options = CacheOptions(
        cache_latents_to_disk=True, vae_batch_size=arguments.batch_size, skip_cache_check=arguments.skip_existing
    )
    fill_latents(dataset, family, load, dtype, options, accelerator)


def of_folders(definition: "DatasetConfig", images: Sequence[str]) -> "DatasetConfig":
    """Return the definition for all images of their folders, with an entry in the metadata or without."""
    (section,) = definition.sections
    (described,) = section.subsets
    plain = replace(described, metadata_file=None, class_tokens="", caption_extension=_NO_CAPTION_FILE)
    folders = dict.fromkeys(os.path.dirname(image) or "." for image in images)
    subsets = tuple(replace(plain, image_dir=folder) for folder in folders)
    return replace(definition, sections=(replace(section, subsets=subsets),))


def note_sizes(dataset: "Dataset", entries: "Entries", *, full_path: bool) -> None:
    """Note the sizes of all images in their entries, made where there are none, and print how many each training size has."""
    from library.dataset.metadata_edit import image_key

    known = set(entries)
    counts: Counter[str] = Counter()
    for item in dataset.items:
        key = image_key(item.path, full_path=full_path)
        width, height = (side // 8 * 8 for side in item.geometry.bucket)
        entries.setdefault(key, {}).update(train_resolution=[width, height], image_size=list(item.size))
        counts[f"{width}x{height}"] += 1
        known.discard(key)
    lines = [f"{len(dataset.items)} images by training size:", *(f"  {size}: {count}" for size, count in sorted(counts.items()))]
    if known:
        lines.append(f"{len(known)} entries of other images stay.")
    say("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
