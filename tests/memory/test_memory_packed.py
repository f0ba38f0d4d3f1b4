"""Weights in 8 and 4 bits: what they lose, what a network learns beside them, and what autograd and loading hold."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import networks.lora
from library.memory.blockwise import NF4
from library.memory.codecs import CODECS
from library.memory.fp8 import SCALED_FLOAT8
from library.memory.packed import Codec, PackedTensor, hold_packed, pack_layers
from library.memory.trace import StorageCounter
from library.models.family import ModelSource
from library.models.sdxl.build import build_unet
from library.models.sdxl.family import SdxlFamily
from library.models.sdxl.sizes import SdxlSizes, plan_unet

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"
CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(4)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def packed(tensor: torch.Tensor, codec: Codec = SCALED_FLOAT8) -> PackedTensor:
    return PackedTensor.pack(tensor, codec)


each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 0.02, 1.0, 300.0])
def test_no_element_is_further_off_than_half_a_unit_of_its_last_place(size: float, dtype: torch.dtype) -> None:
    weight = (draw(64, 48) * size).to(dtype)
    weight[0] *= 2.0**-14  # below the smallest normal number of the format
    held = packed(weight)
    scale = held.parts[1].item()
    assert torch.frexp(held.parts[1])[0] == 0.5  # a power of two
    assert 112 < weight.abs().max().item() / scale <= 448
    error = (held.unpack(torch.float64) - weight.double()).abs()
    assert (error <= torch.maximum(weight.double().abs() / 16, torch.tensor(scale / 1024))).all()
    assert error.max() > 0
    assert torch.equal(held.unpack(torch.bfloat16), held.unpack(torch.float32).to(torch.bfloat16))


@each_codec
def test_zeros_stay_zeros(codec: Codec) -> None:
    assert torch.equal(packed(torch.zeros(64, 64, 3, 3), codec).unpack(), torch.zeros(64, 64, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nf4_is_what_bitsandbytes_makes_of_a_weight(dtype: torch.dtype) -> None:
    weight = draw(128, 96).to(dtype) * 0.02
    given = weight.float() if dtype == torch.float64 else weight
    # Rows of another length than whole blocks are unpacked wrongly by bitsandbytes' kernel for CPUs with AVX512.
    numbers, state = quantize_4bit(given.view(-1), blocksize=64, quant_type="nf4", compress_statistics=True)
    held = packed(weight, NF4)
    assert torch.equal(held.parts[0], numbers.view(-1))
    assert torch.equal(held.unpack(), dequantize_4bit(numbers, state).view(128, 96).to(dtype))
    assert held.dtype == dtype and held.unpack().dtype == dtype
    bits = 8 * sum(part.nbytes for part in packed(draw(1280, 1280), NF4).parts) / 1280**2
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.01)


def test_int8_is_off_by_half_a_step_of_its_block() -> None:
    weight = draw(64, 128, 3, 3) * 0.02
    held = packed(weight, CODECS["int8"])
    blocks = weight.movedim(1, -1).reshape(-1, 256)
    steps = blocks.abs().amax(1, keepdim=True) / 127
    error = (held.unpack().movedim(1, -1).reshape(-1, 256) - blocks).abs() / steps
    assert 0.49 < error.max() < 0.505  # bitsandbytes finds the nearest number by its distance from rounded middles
    bits = 8 * sum(part.nbytes for part in packed(draw(1280, 1280), CODECS["int8"]).parts) / 1280**2
    assert bits == pytest.approx(8.125, abs=0.01)


def test_what_each_codec_loses_of_normally_distributed_weights() -> None:
    weight = draw(512, 512) * 0.02
    lost = {name: ((packed(weight, codec).unpack() - weight).norm() / weight.norm()).item() for name, codec in CODECS.items()}
    assert lost == pytest.approx({"fp8": 0.0265, "int8": 0.0070, "nf4": 0.0920}, rel=0.03)


LAYERS = {
    "linear": (lambda: nn.Linear(64, 128), (2, 5, 64)),
    "linear without bias": (lambda: nn.Linear(64, 128, bias=False), (5, 64)),
    "convolution": (lambda: nn.Conv2d(64, 128, 3, stride=2, padding=1), (2, 64, 9, 9)),
    "in groups": (lambda: nn.Conv2d(128, 64, 3, padding=(1, 0), dilation=2, groups=2, bias=False), (2, 128, 9, 9)),
    "same size": (lambda: nn.Conv2d(64, 64, 3, padding="same"), (2, 64, 9, 9)),
}


@pytest.mark.parametrize("autocast", [False, True])
@each_codec
@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_layer_is_the_plain_layer_with_its_unpacked_weight(name: str, codec: Codec, autocast: bool) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    inputs = [draw(*shape).requires_grad_() for _ in range(2)]
    inputs[1].data = inputs[0].data
    grads = []
    pack_layers(layer, codec)
    assert isinstance(layer.weight, PackedTensor)
    for x in inputs:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            y = layer(x)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        y.square().sum().backward()
        grads.append((y, x.grad, layer.bias.grad if layer.bias is not None else torch.zeros(1)))
        layer.weight = nn.Parameter(layer.weight.to(torch.float32), requires_grad=False)
        layer.zero_grad()
    for ours, plain in zip(*grads, strict=True):
        is_sum = ours is grads[0][2]  # of the bias, over all pixels in another order; single sums may be near 0
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4 * float(plain.abs().max()) if is_sum else 0)


def unet_and_lora(is_packed: bool, autocast: bool, codec: Codec = SCALED_FLOAT8) -> tuple[nn.Module, networks.lora.LoRANetwork]:
    """A tiny U-Net held in few bits, or the same with the values that those stand for; and a LoRA that does something."""
    torch.manual_seed(0)
    unet = build_unet(plan_unet(64, (1, 1, 2), (0, 1, 1), context_dim=96, vector_dim=112)).to_empty(device="cpu")
    for parameter in unet.parameters():
        parameter.data = torch.randn(parameter.shape) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    pack_layers(unet.requires_grad_(False), codec)
    if not is_packed:
        unpack_layers(unet)
    # Convolutions inside residual blocks stay without adapters: both kinds of layers are there.
    network = networks.lora.create_network(1.0, 4, 1.0, None, [], unet)
    network.apply_to([], unet, apply_text_encoder=False)
    for adapter in network.adapters.values():
        nn.init.normal_(adapter.lora_up.weight, std=0.1)
    return unet, network.requires_grad_(True)


def unpack_layers(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(getattr(layer, "weight", None), PackedTensor):
            layer.weight = nn.Parameter(layer.weight.unpack(), requires_grad=False)


@each_codec
@pytest.mark.parametrize(("checkpointing", "autocast"), [(False, False), (True, True)])
def test_a_lora_learns_beside_packed_weights_what_it_learns_beside_their_values(
    checkpointing: bool, autocast: bool, codec: Codec
) -> None:
    inputs = (draw(2, 4, 8, 8), torch.tensor([10, 700]), draw(2, 7, 96), draw(2, 112))
    found = []
    for is_packed in (True, False):
        unet, network = unet_and_lora(is_packed, autocast, codec)
        assert sum(isinstance(weight, PackedTensor) for weight in unet.parameters()) >= 60 * is_packed
        unet.enable_gradient_checkpointing(checkpointing)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            loss = unet(*inputs).float().square().mean()
        loss.backward()
        found.append({"loss": loss.detach()} | {name: weight.grad for name, weight in network.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])
    assert all(gradient.any() for gradient in found[0].values())


def test_autograd_keeps_packed_weights_and_no_plain_copies() -> None:
    def kept_plain(is_packed: bool) -> set[tuple[int, ...]]:
        unet, _ = unet_and_lora(is_packed, autocast=False)
        shapes = {tuple(p.shape) for name, p in unet.named_parameters() if p.ndim > 1 and p.numel() > 10_000}
        shapes |= {shape[::-1] for shape in shapes if len(shape) == 2}
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda nothing: nothing):
            unet(draw(3, 4, 8, 8), torch.tensor([10, 700, 5]), draw(3, 7, 96), draw(3, 112))
        return {tuple(tensor.shape) for tensor in kept if not isinstance(tensor, PackedTensor)} & shapes

    assert kept_plain(False) and not kept_plain(True)


@each_codec
def test_a_packed_weight_moves_with_its_layer_and_can_be_read_but_not_written(codec: Codec) -> None:
    layer = nn.Conv2d(64, 128, 3)
    pack_layers(layer, codec)
    values = layer.weight.unpack()
    layer.to(memory_format=torch.channels_last)
    layer.to(torch.float64)
    assert isinstance(layer.weight, PackedTensor) and layer.weight.dtype == torch.float64
    assert layer.weight.parts[0].element_size() == 1
    assert layer.weight.unpack().is_contiguous(memory_format=torch.channels_last)
    assert layer.weight.stride() == layer.weight.unpack().stride()
    assert torch.equal(layer.weight + 0, values.double())
    assert type(layer.weight.to(torch.float32)) is torch.Tensor and torch.equal(layer.weight.to(torch.float32), values)
    assert torch.equal(layer.state_dict()["weight"].unpack(), values.double())
    with pytest.raises(TypeError, match=f"packed as {codec.name}"):
        layer.weight.data.mul_(2)
    with pytest.raises(TypeError, match=f"packed as {codec.name}"):
        layer.weight.data = values
    assert layer.to("meta").weight.device.type == layer.weight.parts[0].device.type == "meta"


@pytest.mark.parametrize("codec", [SCALED_FLOAT8, NF4], ids=["fp8", "nf4"])
def test_loading_holds_one_plain_weight_at_a_time(tiny_checkpoint: Path, codec: Codec) -> None:
    family = SdxlFamily.open(ModelSource(str(tiny_checkpoint)))
    plain = dict(family.load_denoiser(torch.float32, CPU).named_parameters())
    with StorageCounter(CPU) as counter:
        unet = family.load_denoiser(torch.float32, CPU, hold_packed(codec))
    held = {name: weight for name, weight in unet.named_parameters() if isinstance(weight, PackedTensor)}
    whole = {name for name, weight in plain.items() if weight.ndim > 1} - held.keys()
    assert whole == (set() if codec is SCALED_FLOAT8 else {"input_blocks.0.0.weight", "out.2.weight"})
    assert all(torch.equal(weight.unpack(), packed(plain[name], codec).unpack()) for name, weight in held.items())
    small = sum(weight.numel() for name, weight in plain.items() if name not in held)
    largest = max(weight.numel() for weight in plain.values())
    in_parts = sum(part.nbytes for weight in held.values() for part in weight.parts)
    assert counter.peak.total < in_parts + 4 * small + 4 * 4 * largest + 1024 * 5 * len(plain)
    assert counter.peak.total < 0.5 * 4 * sum(weight.numel() for weight in plain.values())


FULL_WIDTH = plan_unet(320, (1, 2, 4), (0, 2, 10), context_dim=2048, vector_dim=2816)


@pytest.mark.parametrize("codec", [CODECS["int8"], NF4], ids=["int8", "nf4"])
def test_a_block_of_full_width_gives_loss_and_gradient_of_its_unpacked_weights(codec: Codec) -> None:
    with torch.device("meta"):
        unet = build_unet(FULL_WIDTH)
    block = unet.input_blocks[4].to_empty(device="cpu").requires_grad_(False)
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.02)
    pack_layers(block, codec)
    found = []
    drawn = draw(1, 320, 4, 4), draw(1, 1280), draw(1, 7, 2048)
    for _ in range(2):
        inputs = x, emb, context = [each.clone().requires_grad_() for each in drawn]
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = block[1](block[0](x, emb), context).float().square().mean()
        loss.backward()
        found.append([loss.detach(), *(each.grad for each in inputs)])
        unpack_layers(block)
    assert all(torch.equal(ours, plain) and ours.any() for ours, plain in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_the_full_unet_takes_the_memory_that_is_documented(name: str) -> None:
    documented = {
        result: json.loads((RESULTS / f"{result}.json").read_text(encoding="utf-8"))["traced_peak_gib"]["weights"]
        for result in ("traced_lora", f"traced_lora_{name}")
    }
    with torch.device("meta"):
        unet = build_unet(SdxlSizes().unet)
    codec = CODECS[name]
    kinds = Counter(
        layer.weight.shape
        for layer in unet.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and codec.accepts(layer.weight.shape)
    )
    with FakeTensorMode():
        each = {shape: packed(torch.empty(shape, dtype=torch.bfloat16), codec).parts for shape in kinds}
    saved = sum(count * (2 * shape.numel() - sum(part.nbytes for part in each[shape])) for shape, count in kinds.items())
    assert documented["traced_lora"] - documented[f"traced_lora_{name}"] == pytest.approx(saved / 2**30, rel=0.05)
