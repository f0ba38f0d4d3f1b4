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
from library.options.console import set_up_logging
from library.options.dataset_config import DatasetConfig
from library.options.entry import run_script
from library.options.parse import parse
from library.options.scripts import SdxlTrainNetworkOptions
from library.training.inputs import dataset_definition, input_problems, sample_requests
from networks.loading import check_network_module, parse_network_args
from networks.lora_args import parse_lora_args


def main(argv: Sequence[str]) -> None:
    """Check everything that can be checked without loading anything, then train."""
    options = parse(SdxlTrainNetworkOptions, argv, lambda options: input_problems(options, network_arguments, trains_network=True))
    set_up_logging(options.console)
    data = dataset_definition(options)
    train(options, data, sample_requests(options, data.sections[0].resolution))


def network_arguments(options: SdxlTrainNetworkOptions) -> None:
    """Check `--network_module` and `--network_args`; the arguments of other packages' modules are theirs to check."""
    module = options.network.network_module
    arguments = parse_network_args(options.network.network_args)
    if module is not None:
        check_network_module(module)
    if module == "networks.lora":
        parse_lora_args(arguments)


def train(options: SdxlTrainNetworkOptions, data: DatasetConfig, requests: Sequence[ImageRequest]) -> None:
    """Train the network. Torch is loaded here, after everything cheap was checked."""
    from library.models.sdxl.family import SdxlFamily
    from library.training.base_networks import open_with_base_weights
    from library.training.network_recipe import NetworkRecipe
    from library.training.recipe import run_recipe

    open_family = partial(open_with_base_weights, SdxlFamily.open, options.network)
    run_recipe(NetworkRecipe(options), open_family, options, data, requests)


if __name__ == "__main__":
    run_script(main)
