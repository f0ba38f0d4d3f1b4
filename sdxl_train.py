"""Fine-tune an SDXL model: its U-Net, and its text encoders if wanted.

    # one GPU with 24 GB: float32 weights, each stepped inside the backward pass; images and captions encoded once
    accelerate launch sdxl_train.py --pretrained_model_name_or_path sdxl.safetensors --dataset_config data.toml \\
        --output_dir out --output_name my_model --cache_latents --cache_text_encoder_outputs --gradient_checkpointing \\
        --optimizer_type Adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False \\
        --fused_backward_pass --max_grad_norm 0 --learning_rate 4e-7 --lr_scheduler constant_with_warmup --lr_warmup_steps 100 \\
        --max_train_epochs 10 --save_every_n_epochs 1 --seed 42

    # half of that memory: weights in bfloat16, rounded so that small steps still count on average; add
        --mixed_precision bf16 --full_bf16

    # both text encoders too, each with its own rate: leave out the text cache, and add
        --train_text_encoder --learning_rate_te1 2e-7 --learning_rate_te2 1e-7

    # continue exactly where a run stopped (Ctrl+C saves, and prints the command that continues)
        --resume out/my_model-step00000500-state

docs/training.md explains each step, docs/options.md every option.
"""

from collections.abc import Sequence

from library.generation.request import ImageRequest
from library.options.console import set_up_logging
from library.options.dataset_config import DatasetConfig
from library.options.entry import run_script
from library.options.parse import parse
from library.options.scripts import SdxlTrainOptions
from library.training.inputs import dataset_definition, input_problems, sample_requests


def main(argv: Sequence[str]) -> None:
    """Check everything that can be checked without loading anything, then train."""
    options = parse(SdxlTrainOptions, argv, lambda options: input_problems(options, trains_network=False))
    set_up_logging(options.console)
    data = dataset_definition(options)
    train(options, data, sample_requests(options, data.sections[0].resolution))


def train(options: SdxlTrainOptions, data: DatasetConfig, requests: Sequence[ImageRequest]) -> None:
    """Train the model. Torch is loaded here, after everything cheap was checked."""
    from library.models.sdxl.family import SdxlFamily
    from library.training.finetune_recipe import FinetuneRecipe
    from library.training.recipe import run_recipe

    run_recipe(FinetuneRecipe(options), SdxlFamily.open, options, data, requests)


if __name__ == "__main__":
    run_script(main)
