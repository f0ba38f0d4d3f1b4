"""Train a ControlNet-LLLite: small modules with which a frozen SDXL model follows images such as outlines or depth maps.

    # pictures with captions in one folder, control images of the same names in another; both are named in data.toml
    accelerate launch sdxl_train_control_net_lllite.py --pretrained_model_name_or_path sdxl.safetensors \\
        --dataset_config data.toml --output_dir out --output_name outlines --cond_emb_dim 32 --network_dim 64 \\
        --cache_latents_to_disk --cache_text_encoder_outputs_to_disk --mixed_precision bf16 --gradient_checkpointing \\
        --optimizer_type AdamW8bit --learning_rate 2e-4 --max_train_epochs 10 --save_every_n_epochs 1 --seed 42

    # without a dataset file: one folder for each
        --train_data_dir pictures --conditioning_data_dir edges --caption_extension .txt --resolution 1024

    # continue exactly where a run stopped (Ctrl+C saves, and prints the command that continues)
        --resume out/outlines-000003-state

Draw with it: sdxl_gen_img.py --control_net_lllite_models out/outlines.safetensors --guide_image_path edges.png; tools/canny.py
makes edges. docs/control_net_lllite.md explains each step, docs/options.md every option.
"""

from collections.abc import Sequence

from library.generation.request import ImageRequest
from library.options.console import set_up_logging
from library.options.dataset_config import DatasetConfig
from library.options.entry import run_script
from library.options.parse import parse
from library.options.scripts import SdxlTrainControlNetLLLiteOptions
from library.training.inputs import dataset_definition, input_problems, sample_requests


def main(argv: Sequence[str]) -> None:
    """Check everything that can be checked without loading anything, then train."""
    options = parse(SdxlTrainControlNetLLLiteOptions, argv, lambda options: input_problems(options, trains_network=True))
    set_up_logging(options.console)
    data = dataset_definition(options)
    train(options, data, sample_requests(options, data.sections[0].resolution))


def train(options: SdxlTrainControlNetLLLiteOptions, data: DatasetConfig, requests: Sequence[ImageRequest]) -> None:
    """Train the network. Torch is loaded here, after everything cheap was checked."""
    from library.models.sdxl.family import SdxlFamily
    from library.training.control_net_lllite_recipe import ControlNetLLLiteRecipe
    from library.training.recipe import run_recipe

    run_recipe(ControlNetLLLiteRecipe(options), SdxlFamily.open, options, data, requests)


if __name__ == "__main__":
    run_script(main)
