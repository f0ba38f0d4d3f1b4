import json
from pathlib import Path

import pytest
import torch

from library.models.sdxl.build import build_unet
from library.models.sdxl.sizes import TextEncoderSizes, plan_unet
from library.models.sdxl.text_encoders import build_text_encoder

COMPAT = Path(__file__).parents[1] / "compat"


@pytest.fixture(scope="session")
def reference():
    """Numbers computed by the reference implementation; `fill` makes their inputs."""
    return json.loads((COMPAT / "networks_reference_values.json").read_text())


@pytest.fixture(scope="session")
def file_keys():
    """Names and shapes of files of full-size SDXL."""
    return json.loads((COMPAT / "sdxl_lora_keys.json").read_text())


@pytest.fixture(scope="session")
def fill():
    """The reference's input: element i is k·sin(0.37·i² + 0.3)."""

    def make(shape, k):
        i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        return (k * torch.sin(0.37 * i * i + 0.3)).float().reshape(shape)

    return make


@pytest.fixture(scope="session")
def full_size():
    """The real SDXL modules without memory: (text encoders, U-Net) on the meta device."""
    te1 = TextEncoderSizes(768, 12, 12, 3072, 0, "quick_gelu")
    te2 = TextEncoderSizes(1280, 32, 20, 5120, 1280, "gelu")
    return [build_text_encoder(te1), build_text_encoder(te2)], build_unet(plan_unet())


def _with_random_weights(module):
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        scale = 1.0 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale * (0.1 if "norm" in name else 1)
        parameter.requires_grad_(False)
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1])[None])
    return module.eval()


@pytest.fixture
def tiny():
    """A tiny SDXL with random weights, frozen: (text encoders, U-Net)."""
    te1 = TextEncoderSizes.by_convention(32, 2, "quick_gelu")
    te2 = TextEncoderSizes.by_convention(64, 2, "gelu", 64)
    unet = build_unet(plan_unet(64, (1, 1, 2), (0, 1, 1), context_dim=96, vector_dim=64 + 6 * 8))
    return [_with_random_weights(build_text_encoder(te1)), _with_random_weights(build_text_encoder(te2))], _with_random_weights(
        unet
    )


@pytest.fixture(scope="session")
def unet_inputs():
    """Inputs of the tiny U-Net: latents, timesteps, context, vector; two images."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return draw(2, 4, 8, 8), torch.tensor([10, 700]), draw(2, 7, 96), draw(2, 112)


@pytest.fixture(scope="session")
def randomise():
    """Give every adapter of a network random matrices, so that it does something."""

    def fill_network(network, seed=3, size=0.3):
        generator = torch.Generator().manual_seed(seed)
        for adapter in network.adapters.values():
            for matrix in (adapter.lora_down, adapter.lora_up):
                weight = matrix.weight
                weight.data = torch.randn(weight.shape, generator=generator) * size / weight[0].numel() ** 0.5
        return network

    return fill_network
