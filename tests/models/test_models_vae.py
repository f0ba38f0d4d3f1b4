"""The VAE's names, and its numbers against diffusers reading the same file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.diffusion.posterior import sample_posterior
from library.models.sdxl.build import build_part
from library.models.sdxl.single_file import single_file_vae
from library.models.sdxl.sizes import SdxlSizes, vae_sizes
from library.models.sdxl.vae import vae_name, vae_part
from library.models.weights import Entry

COMPAT = Path(__file__).parents[1] / "compat"
TABLE = json.loads((COMPAT / "sdxl_vae_key_map.json").read_text(encoding="utf-8"))
CPU = torch.device("cpu")


def test_single_file_names_become_diffusers_names_as_the_table_says() -> None:
    assert {name: vae_name(name, 4) for name in TABLE["map"]} == TABLE["map"]


def test_diffusers_names_of_any_age_are_kept_or_renewed() -> None:
    for name in TABLE["map"].values():
        assert vae_name(name, 4) == name
        for old, new in TABLE["old_diffusers_attention_names"].items():
            if f".attentions.0.{new}." in name:
                assert vae_name(name.replace(f".{new}.", f".{old}."), 4) == name


def test_full_size_has_every_name_and_shape_of_the_released_checkpoint() -> None:
    keys = json.loads((COMPAT / "sdxl_checkpoint_keys.json").read_text(encoding="utf-8"))["keys"]
    released = {
        name.removeprefix("first_stage_model."): shape for name, shape in keys.items() if name.startswith("first_stage_model.")
    }
    ours = single_file_vae(build_part("vae", SdxlSizes()).state_dict())
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == released


@pytest.mark.parametrize("shape", [(8, 8, 1, 1), (8, 8, 1), (8, 8)])
def test_attention_matrices_are_read_in_every_shape_they_were_ever_saved_in(shape) -> None:
    matrix = torch.arange(64.0)
    part = vae_part({"encoder.mid.attn_1.q.weight": Entry(shape, lambda: matrix.reshape(shape))})
    entry = part["encoder.mid_block.attentions.0.to_q.weight"]
    assert entry.shape == (8, 8)
    assert torch.equal(entry.read(), matrix.reshape(8, 8))


def test_sizes_are_read_back_from_tensor_shapes() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in build_part("vae", SdxlSizes()).state_dict().items()}
    assert vae_sizes(shapes, {}) == SdxlSizes().vae
    assert vae_sizes(shapes, {"arch.vae.scaling_factor": "0.5"}).scaling_factor == 0.5


def test_large_images_are_encoded_in_tiles_where_that_is_asked_for(family) -> None:
    whole = family.load_vae(torch.float32, CPU)
    tiled = replace(family, source=replace(family.source, tile_vae=True)).load_vae(torch.float32, CPU)
    called: list[int] = []
    tiled.encoder.register_forward_pre_hook(lambda _, inputs: called.append(inputs[0].shape[-1]))
    for width, tiles in ((64, [64]), (1088, [1024, 320])):
        images = torch.rand(1, 3, 64, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
        expected, found = (family.encode_posterior(vae, images) for vae in (whole, tiled))
        assert called == tiles and found.shape == expected.shape
        assert torch.equal(found, expected) == (width <= family.vae_tile)
        assert (found - expected).square().mean().sqrt() < 0.1 * expected.std()
        called.clear()


def test_encoding_and_decoding_equal_diffusers(family, pipeline) -> None:
    ours = family.load_vae(torch.float32, CPU)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = pipeline.vae.encode(images).latent_dist
        latents = family.encode_images(ours, images, noise)
        torch.testing.assert_close(latents, posterior.mean + posterior.std * noise, rtol=1e-5, atol=1e-5)
        moments = family.encode_posterior(ours, images)
        torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.logvar], dim=1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sample_posterior(moments, noise), latents, rtol=1e-5, atol=1e-5)
        units = family.to_model_units(latents)
        torch.testing.assert_close(units, latents * 0.13025)
        decoded = family.decode_latents(ours, units)
        torch.testing.assert_close(decoded, pipeline.vae.decode(latents).sample, rtol=1e-5, atol=1e-5)
    assert decoded.std() > 0.05


def test_autocast_does_not_lower_the_precision_of_a_float32_vae(family) -> None:
    vae = family.load_vae(torch.float32, CPU)
    images, noise = torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 4, 4)
    with torch.no_grad():
        expected = family.encode_images(vae, images, noise)
        decoded = family.decode_latents(vae, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(family.encode_images(vae, images, noise), expected)
            assert torch.equal(family.decode_latents(vae, expected), decoded)


def test_latents_are_float32_also_from_a_half_precision_vae(family) -> None:
    vae = family.load_vae(torch.bfloat16, CPU)
    with torch.no_grad():
        latents = family.encode_images(vae, torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 4, 4))
        assert latents.dtype == torch.float32
        assert family.decode_latents(vae, latents).dtype == torch.float32
