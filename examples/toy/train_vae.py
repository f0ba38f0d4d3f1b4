"""Train the toy's VAE from nothing on pictures of the toy's world.

    python examples/toy/train_vae.py vae.safetensors
    python examples/toy/train_vae.py vae.safetensors --steps 20     # only to see that it runs

An `AutoencoderKL` of diffusers in the layout of SDXL's, much smaller. The loss is the mean squared difference of the pictures, a
little of the mean absolute one, and a small weight on the divergence of the latents from a standard normal (Kingma and Welling
2014, "Auto-Encoding Variational Bayes").
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from drawing import SIZE, draw, training_scenes  # noqa: E402

CONFIG = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""Of `diffusers.AutoencoderKL`. Norms have groups of several channels: of one alone the brightness of a flat picture is lost."""
KL_WEIGHT = 1e-6
SIDES = (16, 32, 16, 64, 16, 32, 16, SIZE)
"""Pixels on each side of the crops of one step after the other: colours are learned fastest from many small ones."""


def main(argv: Sequence[str]) -> None:
    """Train, and write the weights with the scaling factor of the latents in the metadata."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="the file to make")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps (3000)")
    parser.add_argument(
        "--batch_size", type=int, default=128, help="crops of 16 x 16 pixels per step, or as many pixels in larger ones (128)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of everything random (1)")
    arguments = parser.parse_args(argv)
    vae, scaling_factor = train(arguments.steps, arguments.batch_size, arguments.seed)
    tensors = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    save_file(tensors, arguments.out, {"scaling_factor": f"{scaling_factor:.5f}"})
    sys.stdout.write(f"{arguments.out}: scaling factor {scaling_factor:.5f}\n")


def train(steps: int, batch_size: int, seed: int) -> tuple[torch.nn.Module, float]:
    """Train a VAE.

    Returns:
        The VAE in evaluation mode, and the factor that gives its latents a standard deviation of 1.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    with torch.no_grad():
        vae.quant_conv.bias[
            CONFIG["latent_channels"] :
        ] = -6.0  # begin with little noise, or the decoder learns to ignore the latents
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.5e-3, total_steps=steps, pct_start=0.05)
    pictures = picture_batch(min(1200, 10 * steps), seed)
    picker = random.Random(seed)
    started = time.monotonic()
    for step in range(steps):
        side = SIDES[step % len(SIDES)]
        batch = crops(pictures, max(1, batch_size * SIDES[0] ** 2 // side**2), side, picker)
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        difference = reconstruction - batch
        error = difference.abs().mean()
        loss = difference.square().mean() + 0.1 * error + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            sys.stdout.write(f"step {step}: mean absolute error {error.item():.4f}, {time.monotonic() - started:.0f} s\n")
            sys.stdout.flush()
    vae.eval()
    with torch.no_grad():
        spread = vae.encode(pictures[:64].float() / 127.5 - 1).latent_dist.sample().std().item()
    return vae, 1 / spread


def picture_batch(number: int, seed: int) -> Tensor:
    """Draw training pictures, uint8 (number, 3, SIZE, SIZE)."""
    drawn = [np.asarray(draw(scene, seed=index)) for index, scene in enumerate(training_scenes(number, seed))]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def crops(pictures: Tensor, number: int, side: int, picker: random.Random) -> Tensor:
    """Cut random squares from random pictures: float32 (number, 3, side, side) in [-1, 1]."""
    pieces = []
    for _ in range(number):
        top, left = picker.randint(0, SIZE - side), picker.randint(0, SIZE - side)
        pieces.append(pictures[picker.randrange(len(pictures)), :, top : top + side, left : left + side])
    return (torch.stack(pieces).float() / 127.5 - 1).to(memory_format=torch.channels_last)


if __name__ == "__main__":
    main(sys.argv[1:])
