"""The ControlNet of SDXL against diffusers' ControlNetModel, and its file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.files.safetensors_io import save_safetensors
from library.models.sdxl.control_net import SdxlControlNet
from library.models.sdxl.family import SdxlFamily
from library.models.sdxl.sizes import SdxlSizes
from library.options.errors import UserError

CPU = torch.device("cpu")
REFERENCE = json.loads((Path(__file__).parents[1] / "compat" / "training_reference_values.json").read_text("utf-8"))["controlnet"]


def shaken(network: SdxlControlNet) -> SdxlControlNet:
    """Give what begins at zero values, as training does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.new_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


@pytest.fixture
def network(family: SdxlFamily) -> SdxlControlNet:
    return family.make_control_net(None, torch.float32, CPU)


@pytest.fixture
def unet(family: SdxlFamily) -> nn.Module:
    return family.load_denoiser(torch.float32, CPU)


@pytest.fixture
def inputs(family: SdxlFamily) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, timesteps, context and vector of two pictures."""
    draw, sizes = torch.Generator().manual_seed(1), family.sizes
    latents = torch.randn(2, 4, 16, 8, generator=draw)
    context = torch.randn(2, 77, sizes.unet.context_dim, generator=draw)
    return latents, torch.tensor([3, 980]), context, torch.randn(2, sizes.unet.vector_dim, generator=draw)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 128, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_full_size_has_the_tensors_of_the_reference() -> None:
    with torch.device("meta"):
        network = SdxlControlNet(SdxlSizes())
    new, copied = network.new_parameters(), network.copied_parameters()
    assert (len(new), len(copied)) == (REFERENCE["tensors_controlnet_prefix"], REFERENCE["tensors_other"])
    assert sum(each.numel() for each in new) == REFERENCE["params_controlnet_prefix"]
    assert sum(each.numel() for each in copied) == REFERENCE["params_other"]
    assert [conv.weight.shape[0] for conv in network.controlnet_down_blocks] == REFERENCE["down_block_channels"]
    stem = {name: list(tensor.shape) for name, tensor in network.controlnet_cond_embedding.state_dict().items()}
    assert stem == REFERENCE["cond_embedding_keys"]
    names = network.names
    assert names["input_blocks.8.1.proj_in.weight"] == "down_blocks.2.attentions.1.proj_in.weight"
    assert len(set(names.values())) == len(network.state_dict())


def test_a_saved_file_does_in_diffusers_what_the_network_does_here(
    network: SdxlControlNet, unet: nn.Module, inputs: Any, images: Tensor, pipeline: Any, tmp_path: Path
) -> None:
    from diffusers import ControlNetModel
    from safetensors.torch import load_file

    shaken(network).save_weights(str(tmp_path / "net.safetensors"), None, {"a": "b"})
    theirs = ControlNetModel.from_unet(pipeline.unet, load_weights_from_unet=False).eval()
    theirs.load_state_dict(load_file(tmp_path / "net.safetensors"))
    latents, timesteps, context, vector = inputs
    split = vector.shape[1] - 6 * pipeline.unet.config.addition_time_embed_dim
    cond = {"text_embeds": vector[:, :split], "time_ids": torch.tensor([[64.0, 96, 0, 8, 128, 96]] * 2)}
    vector = torch.cat([vector[:, :split], theirs.add_time_proj(cond["time_ids"].flatten()).reshape(2, -1)], dim=1)
    with torch.no_grad():
        down, middle = theirs(
            latents, timesteps, context, (images + 1) / 2, conditioning_scale=0.5, added_cond_kwargs=cond, return_dict=False
        )
        expected = pipeline.unet(
            latents, timesteps, context, added_cond_kwargs=cond, down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample  # fmt: skip
        plain = unet(latents, timesteps, context, vector)
        network.apply_to(unet)
        network.see(images)
        network.set_multiplier(0.5)
        for ours, other in zip(network.residuals(latents, timesteps, context, vector) or [], [*down, middle], strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(unet(latents, timesteps, context, vector), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain, expected, atol=1e-2)


def test_an_untrained_network_changes_no_bit_and_a_trained_one_follows_each_image(
    network: SdxlControlNet, unet: nn.Module, inputs: Any, images: Tensor
) -> None:
    with torch.no_grad():
        plain = unet(*inputs)
        network.apply_to(unet)
        network.see(images)
        assert torch.equal(unet(*inputs), plain)
        shaken(network)
        followed = unet(*inputs)
        assert not torch.allclose(followed[0], plain[0], atol=1e-3) and not torch.allclose(followed[1], plain[1], atol=1e-3)
        doubled = unet(*(torch.cat([each, each]) for each in inputs))
        torch.testing.assert_close(doubled, torch.cat([followed, followed]))
        network.see(images.flip(0))
        assert not torch.allclose(unet(*inputs), followed, atol=1e-3)
        network.set_multiplier(0)
        assert torch.equal(unet(*inputs), plain)
        network.set_multiplier(1)
        network.see(None)
        assert torch.equal(unet(*inputs), plain)
        network.see(images[:, :, :64])
        with pytest.raises(ValueError, match="control images of"):
            unet(*inputs)


def test_every_weight_learns_with_and_without_recomputing(
    network: SdxlControlNet, unet: nn.Module, family: SdxlFamily, inputs: Any, images: Tensor
) -> None:
    shaken(network).apply_to(unet)
    network.see(images)
    gradients = []
    for recomputes in (False, True):
        if recomputes:
            family.enable_gradient_checkpointing(network)
            family.enable_gradient_checkpointing(unet)
        unet(*inputs).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
        network.zero_grad(set_to_none=True)
    assert all(gradient is not None and gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_a_file_is_loaded_again_and_others_are_refused(network: SdxlControlNet, family: SdxlFamily, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    shaken(network).save_weights(str(path), None, None)
    again = family.make_control_net(str(path), torch.float32, CPU).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in network.state_dict().items())
    tensors = {network.names[name]: tensor.clone() for name, tensor in network.state_dict().items()}
    name = "controlnet_down_blocks.1.weight"
    cases = {
        "is missing": {key: value for key, value in tensors.items() if key != name},
        "instead of": {**tensors, name: torch.zeros(3, 3, 1, 1)},
        "controlnet_more is not known": {**tensors, "controlnet_more": torch.zeros(1)},
        "is no ControlNet in diffusers' layout": {"lllite_unet_x": torch.zeros(1)},
    }
    for told, content in cases.items():
        save_safetensors(path, content, None)
        with pytest.raises(UserError, match=told):
            family.make_control_net(str(path), torch.float32, CPU)
