"""The U-Net against diffusers' UNet2DConditionModel, and what must not change its numbers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
from torch import Tensor, nn

from library.models.sdxl.build import build_unet
from library.models.sdxl.family import SdxlFamily
from library.models.sdxl.layers import Downsample2D, GroupNorm, LayerNorm, ResnetBlock2D, Transformer2DModel, Upsample2D
from library.models.sdxl.sizes import plan_unet, unet_sizes
from library.models.sdxl.unet import UNet
from library.options.errors import UserError

COMPAT = Path(__file__).parents[1] / "compat"
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(plan_unet(64, (1, 1, 2), (0, 1, 2), 192, 176))


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 4, 16, 12, generator=draw),
        "timesteps": torch.tensor([3, 980]),
        "context": torch.randn(2, 77, 192, generator=draw),
        "y": torch.randn(2, 176, generator=draw),
    }


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_full_size_has_every_name_and_shape_of_the_released_checkpoint() -> None:
    keys = json.loads((COMPAT / "sdxl_checkpoint_keys.json").read_text(encoding="utf-8"))["keys"]
    released = {name[len(PREFIX) :]: tuple(shape) for name, shape in keys.items() if name.startswith(PREFIX)}
    ours = {name: tuple(tensor.shape) for name, tensor in build_unet(plan_unet()).state_dict().items()}
    assert len(released) == 1680
    assert ours == released


@pytest.mark.parametrize(
    ("channels", "mult", "depth"),
    [(320, (1, 2, 4), (0, 2, 10)), (64, (1, 1, 2), (0, 1, 2)), (96, (1, 3), (2, 0)), (64, (1,), (1,))],
)
def test_sizes_are_read_back_from_tensor_shapes(channels, mult, depth) -> None:
    sizes = plan_unet(channels, mult, depth, 192, 176)
    shapes = {name: tuple(tensor.shape) for name, tensor in build_unet(sizes).state_dict().items()}
    assert unet_sizes(shapes, {}) == sizes


def test_a_pruned_unet_with_other_depths_in_each_place_is_understood() -> None:
    shapes = {
        name: tuple(tensor.shape) for name, tensor in build_unet(plan_unet(64, (1, 2), (0, 3), 192, 176)).state_dict().items()
    }
    pruned = {name: shape for name, shape in shapes.items() if not name.startswith("input_blocks.4.1.transformer_blocks.2.")}
    sizes = unet_sizes(pruned, {})
    assert [sizes.input_blocks[index][1].depth for index in (4, 5)] == [2, 3]
    assert build_unet(sizes).state_dict().keys() == pruned.keys()


def test_metadata_sets_the_head_width_that_shapes_cannot_tell() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in build_unet(plan_unet(64, (1,), (1,), 192, 176)).state_dict().items()}
    assert unet_sizes(shapes, {}).middle_block[1].head_dim == 64
    assert unet_sizes(shapes, {"arch.unet.head_dim": "32"}).middle_block[1].head_dim == 32


def test_output_equals_diffusers(unet, inputs) -> None:
    theirs = diffusers_unet(unet)
    with torch.no_grad():
        expected = theirs(
            inputs["x"],
            inputs["timesteps"],
            inputs["context"],
            added_cond_kwargs={"text_embeds": inputs["y"][:, :128], "time_ids": torch.tensor([[64.0, 96, 0, 8, 128, 96]] * 2)},
        ).sample
        sizes = theirs.add_time_proj(torch.tensor([64.0, 96, 0, 8, 128, 96] * 2)).reshape(2, -1)
        ours = unet(inputs["x"], inputs["timesteps"], inputs["context"], torch.cat([inputs["y"][:, :128], sizes], dim=1))
    assert expected.std() > 0.1
    assert relative(ours, expected) < 1e-5


def diffusers_unet(unet: UNet) -> nn.Module:
    from diffusers import UNet2DConditionModel
    from diffusers_reference import unet_config

    from library.models.sdxl.sizes import SdxlSizes, TextEncoderSizes

    sizes = SdxlSizes(unet=unet.sizes, te2=TextEncoderSizes.by_convention(128, 3, "gelu", projection_dim=128))
    theirs = UNet2DConditionModel.from_config(unet_config(sizes))
    names = json.loads((COMPAT / "sdxl_unet_key_map.json").read_text(encoding="utf-8"))["map"]
    theirs.load_state_dict({names[name]: tensor for name, tensor in unet.state_dict().items()})
    return theirs.eval()


def test_a_level_of_real_width_equals_diffusers() -> None:
    torch.manual_seed(0)
    theirs = CrossAttnDownBlock2D(
        320, 640, 1280, num_layers=2, transformer_layers_per_block=1, num_attention_heads=10, cross_attention_dim=2048,
        use_linear_projection=True,
    ).eval()  # fmt: skip
    resnets = [ResnetBlock2D(320, 640, 1280, 32), ResnetBlock2D(640, 640, 1280, 32)]
    transformers = [Transformer2DModel(640, 1, 2048, 64, 2560, 32) for _ in range(2)]
    downsample = Downsample2D(640, 640)
    named = {"4.0": resnets[0], "4.1": transformers[0], "5.0": resnets[1], "5.1": transformers[1], "6.0": downsample}
    names = json.loads((COMPAT / "sdxl_unet_key_map.json").read_text(encoding="utf-8"))["map"]
    weights = theirs.state_dict()
    for place, module in named.items():
        prefix = f"input_blocks.{place}."
        state = {name: weights[names[prefix + name].removeprefix("down_blocks.1.")] for name in module.state_dict()}
        module.load_state_dict(state)
    x, emb, context = torch.randn(1, 320, 8, 12), torch.randn(1, 1280), torch.randn(1, 77, 2048)
    with torch.no_grad():
        expected, _ = theirs(x, emb, context)
        for resnet, transformer in zip(resnets, transformers, strict=True):
            x = transformer(resnet(x, emb), context)
        ours = downsample(x)
    assert relative(ours, expected) < 1e-4


def test_blocks_are_named_in_the_order_of_the_forward_pass(unet, inputs) -> None:
    names, called = {block: name for name, block in unet.blocks().items()}, []
    hooks = [block.register_forward_hook(lambda block, *_: called.append(names[block])) for block in names]
    unet(**inputs)
    for hook in hooks:
        hook.remove()
    assert called == list(unet.blocks())
    outside = sum(parameter.numel() for parameter in unet.parameters()) - sum(
        parameter.numel() for block in names for parameter in block.parameters()
    )
    large = {module for module in unet.modules() if type(module).__name__ in SdxlFamily.large_modules}
    assert outside > 0 and large < set(names)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_gradients_with_checkpointing_equal_those_without(unet, inputs, fraction) -> None:
    plain = gradients(unet, inputs)
    calls: list[str] = []
    hooks = [block.register_forward_pre_hook(lambda *_, name=name: calls.append(name)) for name, block in unet.blocks().items()]
    unet.enable_gradient_checkpointing(fraction)
    try:
        recomputed = gradients(unet, inputs)
    finally:
        unet.enable_gradient_checkpointing(0)
        for hook in hooks:
            hook.remove()
    names = unet.blocks_by_cost()
    again = names[: round(fraction * len(names))]
    assert sorted(calls) == sorted([*names, *again]), "each in the forward pass, and the cheapest again in the backward pass"
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-9, msg=name)
        assert gradient.abs().max() > 0, name


def gradients(unet: UNet, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    unet.zero_grad()
    unet(**inputs).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}


@pytest.mark.parametrize("kind", ["plain", "mem_eff_attn"])
def test_every_kind_of_attention_gives_the_same_output(unet, inputs, kind) -> None:
    with torch.no_grad():
        expected = unet(**inputs)
        unet.set_attention(kind)
        try:
            ours = unet(**inputs)
        finally:
            unet.set_attention("sdpa")
    assert relative(ours, expected) < 1e-5


def test_xformers_that_is_not_installed_is_one_sentence(unet, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(UserError, match="pip install xformers"):
        unet.set_attention("xformers")


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_under_autocast_the_unet_runs_in_bfloat16_whatever_its_weights(unet, inputs, weights) -> None:
    low = UNet(unet.sizes).to(weights)
    low.load_state_dict(unet.state_dict())
    seen: set[torch.dtype] = set()
    for module in low.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = low(**inputs)
    assert seen == {torch.bfloat16}, "float32 norms would double what is kept for the backward pass"
    with torch.no_grad():
        assert relative(ours.float(), unet(**inputs)) < 0.05


@pytest.mark.parametrize(
    ("name", "module"), [("group_norm", GroupNorm(32, 64)), ("layer_norm", LayerNorm(64)), ("interpolate", Upsample2D(64, 64))]
)
def test_what_autocast_would_return_in_float32_on_gpus_runs_outside_of_it(name, module, monkeypatch) -> None:
    real, seen = getattr(torch.nn.functional, name), []

    def spy(*arguments: object, **named: object) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(*arguments, **named)

    monkeypatch.setattr(f"torch.nn.functional.{name}", spy)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(2, 64, 2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert seen == [False]


def test_bfloat16_weights_run_without_autocast(unet, inputs) -> None:
    low = UNet(unet.sizes).to(torch.bfloat16)
    low.load_state_dict(unet.state_dict())
    with torch.no_grad():
        ours = low(**inputs)
        assert ours.dtype == torch.bfloat16
        assert relative(ours.float(), unet(**inputs)) < 0.05


def test_channels_last_changes_no_number_and_stays(unet, inputs) -> None:
    last = UNet(unet.sizes)
    last.load_state_dict(unet.state_dict())
    last = last.to(memory_format=torch.channels_last)
    layouts: list[bool] = []
    last.middle_block[1].register_forward_hook(
        lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    with torch.no_grad():
        ours = last(**inputs | {"x": inputs["x"].to(memory_format=torch.channels_last)})
        assert relative(ours, unet(**inputs)) < 1e-5
    assert layouts == [True]


def test_one_timestep_serves_the_whole_batch(unet, inputs) -> None:
    with torch.no_grad():
        both = unet(**inputs | {"timesteps": torch.tensor([7, 7])})
        one = unet(**inputs | {"timesteps": torch.tensor(7)})
    assert torch.equal(one, both)
