"""What a forward pass keeps goes to main memory and comes back, the same numbers; weights stay."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.memory import host_activations
from library.memory.host_activations import keep_on_host
from library.memory.trace import ACTIVATIONS, WEIGHTS
from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from library.training.denoiser import arrange_denoiser
from tests.memory.test_memory_packed import unet_and_lora
from tools.bench_trace import forecast

CPU = torch.device("cpu")


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that went to main memory."""
    found: list[Tensor] = []
    copy = host_activations.HostActivations._copy

    def noted(self: host_activations.HostActivations, tensor: Tensor) -> object:
        found.append(tensor)
        return copy(self, tensor)

    monkeypatch.setattr(host_activations.HostActivations, "_copy", noted)
    return found


@pytest.mark.parametrize("is_packed", [False, True])
def test_gradients_are_the_same_to_the_last_bit(is_packed: bool, copied: list[Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, 8, 8), (2, 7, 96), (2, 112))
    latents, context, vector = (torch.randn(shape, generator=generator) for shape in shapes)
    found = []
    for on_host in (False, True):
        unet, network = unet_and_lora(is_packed, autocast=False)
        unet.enable_gradient_checkpointing()
        if on_host:
            keep_on_host(unet, [network], smallest=0)
        unet(latents, torch.tensor([10, 700]), context, vector).square().mean().backward()
        found.append({name: weight.grad for name, weight in network.named_parameters()})
        assert bool(copied) == on_host
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    shared = [tensor for tensor in copied if tensor.data_ptr() == context.data_ptr()]
    assert len(shared) == 1  # though every transformer block reads it


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).exp()).exp()


def test_weights_and_small_tensors_stay(copied: list[Tensor]) -> None:
    layers = Layers()
    weights = {weight.data_ptr() for weight in layers.parameters()}
    keep_on_host(layers, smallest=0)
    layers(torch.ones(3, 8)).sum().backward()
    assert copied and not weights & {tensor.data_ptr() for tensor in copied}
    del copied[:]
    with torch.no_grad():
        layers(torch.ones(3, 8))
    layers = Layers()
    keep_on_host(layers, smallest=97)  # each result has 96 bytes
    layers(torch.ones(3, 8)).sum().backward()
    assert not copied


def test_a_tensor_that_was_changed_in_place_is_copied_again(copied: list[Tensor]) -> None:
    x = torch.ones(4, requires_grad=True)
    with host_activations.HostActivations(frozenset(), CPU, 0, None):
        y = x * 1
        squares = y.square()
        with torch.no_grad():
            y.add_(1)
        cubes = y * y.detach() * 2
    (squares.sum() + cubes.sum()).backward()
    assert torch.equal(x.grad, torch.full((4,), 2.0 * 1 + 2 * 2))


def test_a_forecast_counts_only_what_stays_on_the_device() -> None:
    def parts(**flags: Any) -> dict[str, int]:
        bench = BenchOptions(mode="lora", size="tiny", resolution=256, batch_size=2)
        return dict(forecast(bench, StepPrecisionOptions(gradient_checkpointing=True, **flags), OptimizerOptions()).parts)

    plain, on_host, in_8_bits = parts(), parts(cpu_offload_checkpointing=True), parts(fp8_base=True)
    assert on_host[ACTIVATIONS] < 0.6 * plain[ACTIVATIONS] and on_host[WEIGHTS] == plain[WEIGHTS]
    swapped = parts(blocks_to_swap=12)
    assert swapped[WEIGHTS] < 0.72 * plain[WEIGHTS] and swapped[ACTIVATIONS] == plain[ACTIVATIONS]
    assert in_8_bits[WEIGHTS] < 0.42 * plain[WEIGHTS]  # of 4 bytes, but for the network's own


def test_copies_have_a_stream_of_their_own_also_where_the_weights_are_not_on_the_gpu_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.Stream", streams.append)
    precision = StepPrecisionOptions(gradient_checkpointing=True, cpu_offload_checkpointing=True)
    family: Any = None
    for device in (torch.device("cuda"), CPU):
        arrange_denoiser(family, Layers(), Layers(), precision, device)
    assert streams == [torch.device("cuda")]
