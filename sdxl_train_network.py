"""Train a LoRA, or another network, on an SDXL model.

    # one GPU, images and captions encoded once
    accelerate launch sdxl_train_network.py --pretrained_model_name_or_path sdxl.safetensors --dataset_config data.toml \\
        --output_dir out --output_name my_lora --network_module networks.lora --network_dim 32 --network_alpha 16 \\
        --network_train_unet_only --cache_latents --cache_text_encoder_outputs --mixed_precision bf16 --gradient_checkpointing \\
        --optimizer_type AdamW8bit --learning_rate 1e-4 --max_train_epochs 10 --save_every_n_epochs 1 --seed 42

    # both text encoders too, each with its own rate: leave out the text cache and --network_train_unet_only, and add
        --text_encoder_lr1 5e-5 --text_encoder_lr2 1e-5

    # continue exactly where a run stopped (Ctrl+C saves, and prints the command that continues)
        --resume out/my_lora-step00000500-state

docs/training.md explains each step, docs/options.md every option.
"""

from collections.abc import Sequence
from functools import partial

from library.generation.request import ImageRequest
from library.generation.sample_prompts import SampleDefaults, read_sample_prompts
from library.options.checks_optimizer import check_optimizer_options
from library.options.console import set_up_logging
from library.options.dataset_config import DatasetConfig, load_dataset_config
from library.options.entry import run_script
from library.options.errors import problems_of
from library.options.parse import parse
from library.options.scripts import SdxlTrainNetworkOptions
from library.training.outputs import output_problems
from library.training.preview_plan import PreviewPlan
from networks.loading import check_network_module, parse_network_args
from networks.lora_args import parse_lora_args


def main(argv: Sequence[str]) -> None:
    """Check everything that can be checked without loading anything, then train."""
    options = parse(SdxlTrainNetworkOptions, argv, further_problems)
    set_up_logging(options.console)
    data = dataset_definition(options)
    train(options, data, sample_requests(options, data.sections[0].resolution))


def further_problems(options: SdxlTrainNetworkOptions) -> list[str]:
    """Say what is wrong in the files and arguments that the options name; it is told together with their own mistakes."""
    problems = output_problems(options.output) + check_optimizer_options(options.optimizer, options.scheduler)
    for read in (dataset_definition, sample_requests, network_arguments):
        problems += problems_of(partial(read, options))
    return problems


def dataset_definition(options: SdxlTrainNetworkOptions) -> DatasetConfig:
    """Read and check `--dataset_config`, or the folders given in its place."""
    return load_dataset_config(options.dataset, options.caption, options.image, options.cache)


def network_arguments(options: SdxlTrainNetworkOptions) -> None:
    """Check `--network_module` and `--network_args`; the arguments of other packages' modules are theirs to check."""
    module = options.network.network_module
    arguments = parse_network_args(options.network.network_args)
    if module is not None:
        check_network_module(module)
    if module == "networks.lora":
        parse_lora_args(arguments)


def sample_requests(options: SdxlTrainNetworkOptions, size: tuple[int, int] = (1024, 1024)) -> list[ImageRequest]:
    """Read the sample prompts where sample images are wanted; pictures have `size` (width, height) unless they say otherwise."""
    if PreviewPlan.of(options.sample).is_empty or options.sample.sample_prompts is None:
        return []
    defaults = SampleDefaults(width=size[0], height=size[1], sampler=options.sample.sample_sampler)
    return read_sample_prompts(options.sample.sample_prompts, defaults)


def train(options: SdxlTrainNetworkOptions, data: DatasetConfig, requests: Sequence[ImageRequest]) -> None:
    """Train the network. Torch is loaded here, after everything cheap was checked."""
    from library.models.sdxl.family import SdxlFamily
    from library.training.network_recipe import NetworkRecipe
    from library.training.recipe import run_recipe

    run_recipe(NetworkRecipe(), SdxlFamily.open, options, data, requests)


if __name__ == "__main__":
    run_script(main)
