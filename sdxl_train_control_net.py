"""Train a ControlNet: a copy of half the U-Net with which a frozen SDXL model follows images such as outlines or depth maps.

    # pictures with captions in one folder, control images of the same names in another; both are named in data.toml
    accelerate launch sdxl_train_control_net.py --pretrained_model_name_or_path sdxl.safetensors --dataset_config data.toml \\
        --output_dir out --output_name outlines --cache_latents_to_disk --cache_text_encoder_outputs_to_disk \\
        --mixed_precision bf16 --gradient_checkpointing --optimizer_type AdamW8bit --learning_rate 1e-5 --control_net_lr 1e-4 \\
        --max_train_epochs 10 --save_every_n_epochs 1 --seed 42

    # go on from a ControlNet in diffusers' layout
        --controlnet_model_name_or_path diffusion_pytorch_model.safetensors

    # continue exactly where a run stopped (Ctrl+C saves, and prints the command that continues)
        --resume out/outlines-000003-state

The file has diffusers' names, which other programs read too. A network of a few percent of the size is trained by
sdxl_train_control_net_lllite.py. docs/control_net.md explains each step, docs/options.md every option.
"""

from collections.abc import Sequence

from library.generation.request import ImageRequest
from library.options.console import set_up_logging
from library.options.dataset_config import DatasetConfig
from library.options.entry import run_script
from library.options.parse import parse
from library.options.scripts import SdxlTrainControlNetOptions
from library.training.inputs import dataset_definition, input_problems, sample_requests


def main(argv: Sequence[str]) -> None:
    """Check everything that can be checked without loading anything, then train."""
    options = parse(SdxlTrainControlNetOptions, argv, lambda options: input_problems(options, trains_network=True))
    set_up_logging(options.console)
    data = dataset_definition(options)
    train(options, data, sample_requests(options, data.sections[0].resolution))


def train(options: SdxlTrainControlNetOptions, data: DatasetConfig, requests: Sequence[ImageRequest]) -> None:
    """Train the network. Torch is loaded here, after everything cheap was checked."""
    from library.models.sdxl.family import SdxlFamily
    from library.training.control_net_recipe import ControlNetRecipe
    from library.training.recipe import run_recipe

    run_recipe(ControlNetRecipe(options), SdxlFamily.open, options, data, requests)


if __name__ == "__main__":
    run_script(main)
