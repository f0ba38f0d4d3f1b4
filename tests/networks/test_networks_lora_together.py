"""Adapters that are computed together give what each gives alone, in every situation that training knows."""

import copy
import itertools

import pytest
import torch
from torch import nn

from library.models.geglu import gated
from library.models.sdxl.layers import BasicTransformerBlock
from networks.lora import create_network
from networks.lora_module import LoRAModule
from networks.lora_together import LoRABlock
from tools.bench_operations import OperationCounter

WIDTHS = (64, 48, 16, 96)
"""Width, context width, head width, inner width of a small block."""


class Adapted(nn.Module):
    """A block with an adapter in each of its layers, together or each alone."""

    def __init__(self, widths=WIDTHS, *, together, rank=4, **settings):
        super().__init__()
        torch.manual_seed(1)
        self.block = BasicTransformerBlock(*widths).requires_grad_(False)
        layers = {name: layer for name, layer in self.block.named_modules() if isinstance(layer, nn.Linear)}
        self.adapters = {name: LoRAModule(layer, rank, rank / 2, **settings) for name, layer in layers.items()}
        self.parts = nn.ModuleList(self.adapters.values())
        for adapter in self.adapters.values():
            nn.init.normal_(adapter.lora_up.weight, std=0.3)
            adapter.apply_to()
        self.seen = together and LoRABlock(self.block, {id(adapter.layer): adapter for adapter in self.adapters.values()})
        if together:
            self.seen.apply_to()
        self.inputs = (torch.randn(2, 12, widths[0]), torch.randn(2, 5, widths[1]))

    def gradients(self, run=None, dtype=None, seed=3):
        """Return the output and the gradients of the input and of all matrices; None for a matrix that had no part."""
        torch.manual_seed(seed)
        self.zero_grad()
        x, context = (tensor.clone() for tensor in self.inputs)
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            x_in, context = (x.bfloat16(), context.bfloat16()) if dtype is torch.bfloat16 else (x, context)
            y = (run or self.block)(x_in, context)
        y.float().square().mean().backward()
        return [y.detach(), x.grad, *(parameter.grad for parameter in self.parts.parameters())]


def error(found, true):
    """The relative error of tensors, each in the Euclidean norm: the largest."""
    pairs = zip(found, true, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


@pytest.mark.parametrize("widths", [WIDTHS, (1280, 2048, 64, 5120)], ids=["small", "as wide as SDXL"])
def test_in_float32_all_is_the_same_but_for_the_order_of_sums(widths):
    together, alone = (Adapted(widths, together=each).gradients() for each in (True, False))
    assert error(together, alone) < 1e-6 * (1 if widths is WIDTHS else 2)  # sums over 1280 terms and more round more often


@pytest.mark.parametrize("widths", [WIDTHS, (1280, 2048, 64, 5120)], ids=["small", "as wide as SDXL"])
def test_in_bfloat16_the_error_is_that_of_each_alone(widths):
    exact = Adapted(widths, together=False).gradients()
    models = [Adapted(widths, together=each) for each in (True, False)]
    for model in models:
        model.block.bfloat16()
    together, alone = (error(model.gradients(dtype=torch.bfloat16), exact) for model in models)
    assert all(grad.dtype == torch.float32 for grad in models[0].gradients(dtype=torch.bfloat16)[1:])
    assert together < 0.05 and together < 1.1 * alone


def test_one_operation_copies_all_matrices_and_layers_with_one_input_take_one_product():
    counts = []
    for together in (True, False):
        model = Adapted(together=together)
        model.block.bfloat16()
        with OperationCounter() as counter:
            model.gradients(dtype=torch.bfloat16)
        counts.append(counter.counts)
    together, alone = counts
    assert together["_foreach_copy_"] == 2 and together["_to_copy"] == alone["_to_copy"] - 4 * 10
    assert together["baddbmm_"] == 6
    assert together.total() < 0.65 * alone.total()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_after_a_gate_the_adapter_keeps_the_gates_halves_and_gives_the_same_to_the_bit(dtype, monkeypatch):
    model = Adapted((640, 2048, 64, 2560), together=True)
    model.block.to(dtype or torch.float32)

    def gradients_and_kept():
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return model.gradients(dtype=dtype), sum(kept.values())

    found, kept = gradients_and_kept()
    monkeypatch.setattr(LoRAModule, "after_gate", lambda self, halves: self.layer(gated(halves)))
    expected, more = gradients_and_kept()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert more - kept == 2 * 12 * 2560 * (
        4 if dtype is None else 2
    )  # (images, tokens, inner width) in the type of the computation


@pytest.mark.parametrize("kind", ["neuron", "rank", "module"])
def test_dropouts_draw_and_do_the_same(kind):
    from networks.lora_module import Dropouts

    settings = {"dropouts": Dropouts(**{kind: 0.4})}
    together, alone = (Adapted(together=each, **settings) for each in (True, False))
    for dtype in (None, torch.bfloat16):
        for found, expected in zip(together.gradients(dtype=dtype), alone.gradients(dtype=dtype), strict=True):
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)
    missing = sum(grad is None for grad in together.gradients())
    assert (missing > 0) == (kind == "module")
    together.eval()
    assert torch.equal(together.gradients()[0], together.gradients(seed=4)[0])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_checkpointing_gives_the_same_to_the_bit(dtype):
    model = Adapted(together=True)
    plain = model.gradients(dtype=dtype)
    again = model.gradients(lambda *inputs: torch.utils.checkpoint.checkpoint(model.block, *inputs, use_reentrant=False), dtype)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    assert all(adapter.at_hand.matrices is adapter.joint is None for adapter in model.adapters.values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_add_up_and_no_two_of_them_share_a_place(dtype):
    model = Adapted(together=True)
    once = [grad.clone() for grad in model.gradients(dtype=dtype)[2:]]
    torch.manual_seed(3)
    model.zero_grad = lambda: None
    twice = model.gradients(dtype=dtype)[2:]
    assert error(twice, [2 * grad for grad in once]) < 1e-6
    spans = sorted((grad.data_ptr(), grad.data_ptr() + grad.nbytes) for grad in twice)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_only_what_is_trained_gets_a_gradient():
    model = Adapted(together=True)
    for adapter in model.adapters.values():
        adapter.lora_down.weight.requires_grad_(False)
    model.adapters["attn1.to_k"].lora_up.weight.requires_grad_(False)
    found = model.gradients()
    expected = [name.endswith("lora_up.weight") and not name.startswith("1.") for name, _ in model.parts.named_parameters()]
    assert [grad is not None for grad in found[2:]] == expected


def change_nothing(model):
    pass


def give_one_its_own_alpha(model):
    model.adapters["attn1.to_v"].alpha_value = 3.0


def switch_one_off(model):
    model.adapters["attn1.to_q"].enabled = False


def switch_all_off(model):
    for adapter in model.adapters.values():
        adapter.multiplier = 0.0


def train_one_base(model):
    model.block.attn2.to_k.weight.requires_grad_()


def add_a_network(model):
    torch.manual_seed(9)
    second = LoRAModule(model.block.attn1.to_q, 2, 2.0)
    nn.init.normal_(second.lora_up.weight)
    second.apply_to()
    model.second = second


@pytest.mark.parametrize(
    ("change", "joined"),
    [
        (change_nothing, 2),
        (give_one_its_own_alpha, 1),
        (switch_one_off, 1),
        (switch_all_off, 0),
        (train_one_base, 1),
        (add_a_network, 1),
    ],
)
def test_what_cannot_be_computed_together_is_computed_alone(change, joined):
    together, alone = Adapted(together=True), Adapted(together=False)
    change(together)
    change(alone)
    found, expected = together.gradients(), alone.gradients()
    there = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    assert sum(grad is None for grad in found) == sum(grad is None for grad in expected)
    assert error(*zip(*there, strict=True)) < 1e-6
    with OperationCounter() as counter, torch.no_grad():
        together.block(*together.inputs)
    assert counter.counts["baddbmm_"] == joined


def test_layers_of_other_ranks_are_left_alone(tiny):
    block = BasicTransformerBlock(*WIDTHS).requires_grad_(False)
    adapters = [LoRAModule(layer, rank, 1) for layer, rank in zip(block.attn1.projections, (4, 4, 2), strict=True)]
    for adapter in adapters:
        adapter.apply_to()
    LoRABlock(block, {id(adapter.layer): adapter for adapter in adapters}).apply_to()
    with torch.autocast("cpu", torch.bfloat16), OperationCounter() as counter:
        block(torch.randn(1, 3, 64, requires_grad=True), torch.randn(1, 2, 48))
    assert counter.counts["_foreach_copy_"] == 1 and counter.counts["baddbmm_"] == 0


def test_a_network_works_together_in_every_block_and_changes_no_file(tiny, unet_inputs, randomise, tmp_path):
    _, unet = tiny
    other = copy.deepcopy(unet)
    networks = [randomise(create_network(1.0, 4, 2.0, None, [], each)) for each in (unet, other)]
    networks[0].apply_to([], unet)
    networks[1].apply_to([], None)
    outputs = [each(*unet_inputs) for each in (unet, other)]
    assert error([outputs[0].detach()], [outputs[1].detach()]) < 1e-6
    for output in outputs:
        output.square().mean().backward()
    grads = [torch.cat([parameter.grad.flatten() for parameter in network.parameters()]) for network in networks]
    assert error(grads[:1], grads[1:]) < 2e-6
    assert networks[0].state_dict().keys() == networks[1].state_dict().keys()


def test_a_block_compiles_into_one_graph():
    model = Adapted(together=True)
    eager = model.gradients()
    compiled = torch.compile(model.block.forward, backend="aot_eager", fullgraph=True)
    assert error(model.gradients(compiled), eager) < 1e-6


def test_a_hook_on_a_layer_sees_what_the_layer_gives():
    model = Adapted(together=True)
    before = model.gradients()
    seen: list[torch.Tensor] = []
    model.block.attn1.to_k.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    assert error(model.gradients(), before) < 1e-6
    assert len(seen) == 1 and seen[0].shape == (2, 12, WIDTHS[0])
