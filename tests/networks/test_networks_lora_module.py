import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from networks.lora_module import Dropouts, LoRAModule
from networks.low_rank import scaled_product


def layer_of(kind, channels_last=False):
    torch.manual_seed(5)
    layer = {
        "linear": lambda: nn.Linear(6, 5),
        "linear without bias": lambda: nn.Linear(6, 5, bias=False),
        "conv 3×3": lambda: nn.Conv2d(6, 5, 3, padding=1),
        "conv 3×3 stride 2": lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1, dilation=1),
        "conv 1×1": lambda: nn.Conv2d(6, 5, 1),
    }[kind]()
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    return layer.requires_grad_(False)


def input_for(layer, dtype=torch.float32, channels_last=False):
    torch.manual_seed(6)
    if isinstance(layer, nn.Linear):
        return torch.randn(3, 4, 6, dtype=dtype)
    x = torch.randn(3, 6, 7, 8, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def adapted(layer, rank=3, alpha=1.5, multiplier=0.8, dropouts=None):
    adapter = LoRAModule(layer, rank, alpha, multiplier, dropouts)
    torch.manual_seed(7)
    nn.init.normal_(adapter.lora_up.weight, std=0.3)
    adapter.apply_to()
    return adapter


def textbook(layer, adapter, x):
    """W₀x + b + multiplier·(α/r)·U(Dx) from separate operations in float64, and the leaves to take gradients of."""
    plain = copy.deepcopy(layer)
    plain.__dict__.pop("forward", None)
    plain = plain.double()
    x, down, up = (t.detach().double().requires_grad_() for t in (x, adapter.lora_down.weight, adapter.lora_up.weight))
    if isinstance(layer, nn.Linear):
        delta = x @ down.T @ up.T
    else:
        delta = nn.functional.conv2d(nn.functional.conv2d(x, down, None, layer.stride, layer.padding), up)
    return plain(x) + adapter.multiplier * adapter.alpha_value / adapter.rank * delta, (x, down, up)


KINDS = ["linear", "linear without bias", "conv 3×3", "conv 3×3 stride 2", "conv 1×1"]


@pytest.mark.parametrize(
    ("kind", "channels_last"), [*itertools.product(KINDS, [False]), ("conv 3×3", True), ("conv 3×3 stride 2", True)]
)
def test_output_and_gradients_are_those_of_the_formula(kind, channels_last):
    layer = layer_of(kind, channels_last)
    x = input_for(layer, channels_last=channels_last).requires_grad_()
    adapter = adapted(layer)
    expected, leaves = textbook(layer, adapter, x)
    y = layer(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(y.shape)
    grads = torch.autograd.grad(y, (x, adapter.lora_down.weight, adapter.lora_up.weight), grad)
    for found, true in zip(grads, torch.autograd.grad(expected, leaves, grad.double()), strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_the_result_is_bfloat16_and_the_gradients_are_float32(kind):
    layer = layer_of(kind).bfloat16()
    x = input_for(layer).requires_grad_()
    adapter = adapted(layer)
    expected, leaves = textbook(layer, adapter, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    true = torch.autograd.grad(expected.square().sum(), leaves)
    for found, right in zip((x.grad, adapter.lora_down.weight.grad, adapter.lora_up.weight.grad), true, strict=True):
        assert found.dtype == torch.float32
        assert (found.double() - right).norm() < 0.02 * right.norm()


@pytest.mark.parametrize("kind", ["linear", "conv 3×3"])
def test_the_formula_itself_passes_a_numerical_gradient_check(kind):
    layer = layer_of(kind).double()
    adapter = adapted(layer, rank=2).double()
    x = input_for(layer, torch.float64)[:1].requires_grad_()
    down, up = adapter.lora_down.weight, adapter.lora_up.weight
    assert torch.autograd.gradcheck(lambda x, down, up: layer(x), (x, down, up), fast_mode=True)


def test_only_what_is_needed_gets_a_gradient():
    layer = layer_of("linear")
    adapter = adapted(layer)
    adapter.lora_down.weight.requires_grad_(False)
    x = input_for(layer)
    layer(x).sum().backward()
    assert adapter.lora_down.weight.grad is None
    assert adapter.lora_up.weight.grad is not None
    assert layer.weight.grad is None


def test_the_input_and_the_small_product_are_all_that_a_step_keeps():
    layer, kept = layer_of("linear"), []
    adapter = adapted(layer)
    x = input_for(layer).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    weights = {t.data_ptr() for t in (layer.weight, adapter.lora_down.weight, adapter.lora_up.weight)}
    activations = [t for t in kept if t.data_ptr() not in weights]
    assert sorted(tuple(t.shape) for t in activations) == [(3, 4, 3), (3, 4, 6)]
    assert x.data_ptr() in {t.data_ptr() for t in activations}


@pytest.mark.parametrize("kind", ["linear", "linear without bias"])
def test_a_base_layer_that_is_trained_too_gets_its_own_gradient(kind):
    layer = layer_of(kind).requires_grad_()
    adapter = adapted(layer)
    x = input_for(layer).requires_grad_()
    expected, leaves = textbook(layer, adapter, x)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(dim=(0, 1)).expand(5, 6))
    torch.testing.assert_close(x.grad.double(), torch.autograd.grad(expected.sum(), leaves[0])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_networks_on_one_layer_add_up(kind):
    layer = layer_of(kind)
    plain_output = layer(x := input_for(layer))
    first = adapted(layer, rank=2)
    first_output = layer(x)
    second = adapted(layer, rank=3, alpha=3.0, multiplier=-0.5)
    both = layer(x)
    first.enabled = False
    torch.testing.assert_close(both, first_output + layer(x) - plain_output)
    second.enabled = False
    torch.testing.assert_close(layer(x), plain_output)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_the_output_of_the_adapter(kind):
    layer = layer_of(kind)
    adapter = adapted(layer)
    x = input_for(layer)
    with_adapter = layer(x)
    original = layer.weight.detach().clone()
    adapter.backup_weight()
    adapter.merge(adapter.delta_weight())
    adapter.enabled = False
    torch.testing.assert_close(layer(x), with_adapter, rtol=1e-5, atol=1e-5)
    adapter.restore_weight()
    assert torch.equal(layer.weight, original)
    torch.testing.assert_close(layer(x), with_adapter)


def test_checkpointing_draws_the_same_dropouts_again():
    layer = layer_of("linear")
    adapter = adapted(layer, dropouts=Dropouts(neuron=0.3, rank=0.3, module=0.3))
    x = input_for(layer)

    def gradients(run):
        torch.manual_seed(11)
        adapter.zero_grad()
        for _ in range(5):
            run(x.clone().requires_grad_()).square().sum().backward()
        return adapter.lora_down.weight.grad, adapter.lora_up.weight.grad

    expected = gradients(layer)
    found = gradients(lambda x: checkpoint(layer, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["linear", "conv 3×3"])
def test_the_adapter_compiles_into_one_graph(kind):
    layer = layer_of(kind)
    adapter = adapted(layer)
    x = input_for(layer).requires_grad_()
    grads = torch.autograd.grad(layer(x).square().sum(), (x, adapter.lora_down.weight))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), (x, adapter.lora_down.weight))
    for a, b in zip(found, grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_scaled_product_does_not_see_what_was_in_memory():
    a, b = torch.randn(3, 4), torch.randn(4, 2)
    torch.use_deterministic_algorithms(True)  # fills new memory with not-a-number
    try:
        assert torch.empty(2).isnan().all()
        torch.testing.assert_close(scaled_product(a, b, 0.5), 0.5 * (a @ b))
    finally:
        torch.use_deterministic_algorithms(False)


def reference_layer(values, fill):
    layer = nn.Linear(6, 5)
    layer.weight.data, layer.bias.data = fill((5, 6), 0.5), fill((5,), 0.1)
    return layer.requires_grad_(False)


def test_the_linear_example_equals_the_reference(reference, fill):
    values = reference["lora_linear"]
    layer = reference_layer(values, fill)
    adapter = LoRAModule(layer, values["rank"], values["alpha"], values["multiplier"])
    adapter.lora_down.weight.data, adapter.lora_up.weight.data = fill((3, 6), 0.3), fill((5, 3), 0.2)
    adapter.apply_to()
    torch.testing.assert_close(layer(fill((2, 4, 6), 1)), torch.tensor(values["y"]), rtol=0, atol=1e-6)


def test_the_strided_convolution_example_equals_the_reference(reference, fill):
    values = reference["lora_conv3x3_stride2"]
    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1).requires_grad_(False)
    layer.weight.data, layer.bias.data = fill((4, 3, 3, 3), 0.5), fill((4,), 0.1)
    adapter = LoRAModule(layer, 2, 1.0)
    adapter.lora_down.weight.data, adapter.lora_up.weight.data = fill((2, 3, 3, 3), 0.3), fill((4, 2, 1, 1), 0.2)
    adapter.apply_to()
    torch.testing.assert_close(layer(fill((1, 3, 5, 5), 1)), torch.tensor(values["y"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(adapter.delta_weight(), torch.tensor(values["merged_delta"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["neuron", "rank", "module"])
def test_dropouts_draw_and_scale_as_the_reference_does(reference, fill, kind):
    layer = reference_layer(reference["lora_linear"], fill)
    adapter = LoRAModule(layer, 3, 3.0, dropouts=Dropouts(**{kind: 0.5}))
    adapter.lora_down.weight.data, adapter.lora_up.weight.data = fill((3, 6), 0.3), fill((5, 3), 0.2)
    adapter.apply_to()
    torch.manual_seed(7)
    found = torch.stack([layer(fill((2, 4, 6), 1)) for _ in range(2)])
    torch.testing.assert_close(found, torch.tensor(reference["lora_dropout_seed7"][kind]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv 3×3 stride 2", "conv 1×1"])
def test_dropouts_act_in_training_mode_only_and_reach_every_kind_of_layer(kind):
    layer = layer_of(kind)
    x = input_for(layer)
    adapter = adapted(layer, dropouts=Dropouts(neuron=0.5, rank=0.5))
    assert not torch.equal(layer(x), layer(x))
    adapter.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x).double(), textbook(layer, adapter, x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv 3×3 stride 2"])
def test_gradients_flow_through_the_dropout_mask_alone(kind):
    layer = layer_of(kind)
    adapter = adapted(layer, dropouts=Dropouts(rank=0.5))
    x = input_for(layer).requires_grad_()

    def gradients(frozen):
        layer.weight.requires_grad_(not frozen)  # a base that is trained takes the path of separate operations
        torch.manual_seed(12)
        return torch.autograd.grad(layer(x).square().sum(), (x, adapter.lora_down.weight, adapter.lora_up.weight))

    for found, separate in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, separate)


def test_new_adapters_do_nothing_and_are_drawn_uniformly():
    layer = layer_of("conv 3×3")
    x = input_for(layer)
    before = layer(x)
    adapter = LoRAModule(layer, 500, None)
    adapter.apply_to()
    assert torch.equal(layer(x), before)
    bound = (6 * 9) ** -0.5
    drawn = adapter.lora_down.weight
    assert drawn.abs().max() <= bound
    assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert adapter.scale == 1.0


def test_the_multiplier_zero_leaves_the_layer_alone():
    layer = layer_of("linear")
    x = input_for(layer)
    before = layer(x)
    adapter = adapted(layer)
    adapter.multiplier = 0.0
    assert torch.equal(layer(x), before)
