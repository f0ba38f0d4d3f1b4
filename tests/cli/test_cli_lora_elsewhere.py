"""A LoRA trained by our command draws the same picture in diffusers as with our command."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image

from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from tests.cli.training_commands import ROOT, arguments, run_command, write_dataset
from tests.diffusers_reference import write_configs

PROMPT, NEGATIVE, SEED, STEPS, SIDE = "a boat on the water", "blurry", 5, 4, 96


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, photos: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    more = ["--learning_rate", "2e-2", "--max_train_steps", "8", "--network_args", "conv_dim=2", "--network_dropout", "0"]
    done = run_command(arguments(tiny_checkpoint, write_dataset(folder, photos), folder / "out", *more))
    assert done.returncode == 0, done.stderr
    return folder / "out" / "net.safetensors"


def draw_here(checkpoint: Path, folder: Path, *lora: str) -> np.ndarray:
    options = ["--ckpt", str(checkpoint), "--outdir", str(folder), "--prompt", f"{PROMPT} --n {NEGATIVE}", "--W", str(SIDE)]
    options += ["--H", str(SIDE), "--steps", str(STEPS), "--sampler", "euler", "--scale", "5", "--seed", str(SEED), *lora]
    done = run_command(options, script=str(ROOT / "sdxl_gen_img.py"))
    assert done.returncode == 0, done.stderr
    (picture,) = folder.glob("*.png")
    return np.asarray(Image.open(picture).convert("RGB"), dtype=np.float32)


def draw_in_diffusers(checkpoint: Path, folder: Path, lora: Path) -> np.ndarray:
    config = write_configs(folder, SdxlFamily.open(ModelSource(str(checkpoint))).sizes)
    pipeline = StableDiffusionXLPipeline.from_single_file(str(checkpoint), config=str(config), torch_dtype=torch.float32)
    pipeline.scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace"
    )
    pipeline.load_lora_weights(str(lora))
    generator = torch.Generator().manual_seed(SEED)
    found = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        width=SIDE,
        height=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        generator=generator,
        output_type="np",
    )
    return found.images[0] * 255


def test_diffusers_draws_our_picture_with_our_lora(tiny_checkpoint: Path, trained: Path, tmp_path: Path) -> None:
    base = draw_here(tiny_checkpoint, tmp_path / "base")
    ours = draw_here(tiny_checkpoint, tmp_path / "ours", "--network_module", "networks.lora", "--network_weights", str(trained))
    theirs = draw_in_diffusers(tiny_checkpoint, tmp_path / "config", trained)
    assert np.abs(ours - theirs).mean() < 2
    assert np.abs(ours - base).mean() > 4  # the LoRA is not what the two have in common by doing nothing
