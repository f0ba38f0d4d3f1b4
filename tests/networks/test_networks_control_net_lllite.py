import pytest
import torch
from torch import nn

from library.files.tensors import save_tensors
from library.options.errors import UserError
from networks.control_net_lllite import ControlNetLLLite, Widths, from_file
from networks.lllite_module import LLLiteModule


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_module_does_what_the_reference_does(reference, fill, depth):
    expected = reference["lllite"][f"depth {depth}"]
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight.copy_(fill((5, 6), 0.5))
        layer.bias.copy_(fill((5,), 0.1))
    module = LLLiteModule(layer, depth, cond_emb_dim=8, mlp_dim=4, multiplier=0.7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(fill(parameter.shape, 0.2))
    side = expected["side"]
    module.see(fill((1, 3, side, side), 1))
    module.apply_to()
    y = layer(fill((2, expected["tokens"], 6), 1))
    torch.testing.assert_close(module.features[0, 0], torch.tensor(expected["cond_emb[0,0]"]), rtol=0, atol=2e-6)
    torch.testing.assert_close(y[0, 0], torch.tensor(expected["y[0,0]"]), rtol=0, atol=2e-6)
    torch.testing.assert_close(y[1, -1], torch.tensor(expected["y[1,-1]"]), rtol=0, atol=2e-6)


def test_names_and_shapes_of_full_size_are_those_of_other_software(file_keys, full_size):
    expected = {name: shape for name, shape in file_keys["networks.control_net_lllite/default"].items() if name[0] != "_"}
    with torch.device("meta"):
        network = ControlNetLLLite(full_size[1], Widths(16, 16))
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == expected
    assert len(network.adapters) == 136


def shaken(network):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_untrained_modules_change_no_bit_and_trained_ones_follow_the_image(tiny, unet_inputs):
    unet = tiny[1]
    plain = unet(*unet_inputs)
    network = ControlNetLLLite(unet, Widths(8, 4))
    network.apply_to()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    network.see(images)
    assert torch.equal(unet(*unet_inputs), plain)
    shaken(network)
    network.see(images)
    moved = unet(*unet_inputs)
    network.see(images.flip(0))
    other = unet(*unet_inputs)
    assert not torch.allclose(moved, plain, atol=1e-4) and not torch.allclose(moved, other, atol=1e-5)
    network.see(None)
    assert torch.equal(unet(*unet_inputs), plain)
    network.see(images)
    network.set_multiplier(0.0)
    assert torch.equal(unet(*unet_inputs), plain)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_saved_network_is_loaded_whole_and_says_what_it_is_not(tiny, tmp_path, ending):
    unet = tiny[1]
    network = ControlNetLLLite(unet, Widths(8, 4))
    shaken(network)
    file = str(tmp_path / f"control.{ending}")
    network.save_weights(file, None, {"a": "b"})
    again = from_file(unet, file)
    assert again.widths == (8, 4)
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    with pytest.raises(UserError, match="--cond_emb_dim 8 and --network_dim 4"):
        ControlNetLLLite(unet, Widths(8, 6)).load_weights(file)
    other = str(tmp_path / f"other.{ending}")
    save_tensors(other, {"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, None)
    with pytest.raises(UserError, match="no ControlNet-LLLite file"):
        from_file(unet, other)


def test_control_images_of_another_size_are_refused_in_a_sentence(tiny, unet_inputs):
    network = ControlNetLLLite(tiny[1], Widths(8, 4))
    network.apply_to()
    network.see(torch.zeros(2, 3, 32, 64))
    with pytest.raises(ValueError, match="pictures' size"):
        tiny[1](*unet_inputs)


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    module = LLLiteModule(nn.Linear(8, 4), 1, cond_emb_dim=4, mlp_dim=32, dropout=0.5)
    nn.init.ones_(module.up[0].weight)
    module.see(torch.zeros(1, 3, 8, 8))
    x = torch.randn(1, 1, 8)
    assert not torch.equal(module.train().shift(x), module.shift(x))
    assert torch.equal(module.eval().shift(x), module.shift(x))


def test_gradients_reach_what_sees_the_image_through_checkpointed_blocks(tiny, unet_inputs):
    unet = tiny[1].requires_grad_(False)
    network = ControlNetLLLite(unet, Widths(8, 4))
    network.apply_to()
    shaken(network)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for recompute in (False, True):
        unet.enable_gradient_checkpointing(recompute)
        network.see(images)
        unet(*unet_inputs).square().mean().backward()
        found.append({name: parameter.grad for name, parameter in network.named_parameters()})
        network.zero_grad(set_to_none=True)
    plain, recomputed = found
    assert all(gradient is not None and gradient.any() for name, gradient in plain.items() if ".conditioning1.0." in name)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)
