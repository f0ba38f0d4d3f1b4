import pytest
import torch
from torch import nn

from library.options.errors import UserError
from networks.lora import create_network


def saved_shapes(network):
    network.apply_to(None, None)
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def expected_shapes(file_keys, section):
    return {name: shape for name, shape in file_keys[section].items() if not name.startswith("_")}


def counts(network):
    return {prefix: sum(name.startswith(prefix) for name in network.adapters) for prefix in ("lora_unet", "lora_te1", "lora_te2")}


def fresh(full_size):
    """Forget what earlier networks put into the modules."""
    encoders, unet = full_size
    for model in (*encoders, unet):
        for module in model.modules():
            module.__dict__.pop("forward", None)
    return encoders, unet


def test_names_and_shapes_of_full_size_sdxl_equal_the_reference(full_size, file_keys):
    encoders, unet = fresh(full_size)
    network = create_network(1.0, 4, 1, None, encoders, unet)
    assert counts(network) == {"lora_unet": 722, "lora_te1": 72, "lora_te2": 192}
    assert saved_shapes(network) == expected_shapes(file_keys, "networks.lora/lierla")


def test_names_and_shapes_with_convolutions_equal_the_reference(full_size, file_keys):
    encoders, unet = fresh(full_size)
    network = create_network(1.0, 4, 1, None, encoders, unet, conv_dim="4", conv_alpha="1")
    assert saved_shapes(network) == expected_shapes(file_keys, "networks.lora/c3lier")


def test_a_network_made_after_one_with_convolutions_has_none_itself(full_size):
    encoders, unet = fresh(full_size)
    create_network(1.0, 4, 1, None, encoders, unet, conv_dim="4")
    assert counts(create_network(1.0, 4, 1, None, encoders, unet))["lora_unet"] == 722


def test_an_encoder_that_is_not_loaded_gets_no_adapters_and_the_other_keeps_its_name(full_size):
    encoders, unet = fresh(full_size)
    assert counts(create_network(1.0, 4, 1, None, [None, encoders[1]], unet)) == {"lora_unet": 722, "lora_te1": 0, "lora_te2": 192}
    assert counts(create_network(1.0, 4, 1, None, None, unet)) == {"lora_unet": 722, "lora_te1": 0, "lora_te2": 0}


def test_names_have_the_text_model_level_whatever_the_encoder_calls_its_parts():
    class CLIPMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(2, 2)

    flat = nn.ModuleDict({"encoder": nn.ModuleList([CLIPMLP()])})
    nested = nn.ModuleDict({"text_model": flat})
    for encoder in (flat, nested):
        network = create_network(1.0, 1, 1, None, [encoder, None], nn.Module())
        assert list(network.adapters) == ["lora_te1_text_model_encoder_0_fc1"]
    network = create_network(1.0, 1, 1, None, flat, nn.Module())
    assert list(network.adapters) == ["lora_te_text_model_encoder_0_fc1"]


@pytest.mark.parametrize(
    ("train_text", "train_unet", "expected"), [(False, True, {"lora_unet"}), (True, False, {"lora_te1", "lora_te2"})]
)
def test_a_part_that_is_not_trained_has_no_adapters_and_no_keys(tiny, train_text, train_unet, expected):
    network = create_network(1.0, 4, 1, None, *tiny)
    network.apply_to(*tiny, train_text, train_unet)
    assert {"_".join(name.split("_")[:2]) for name in network.state_dict()} == expected
    assert {"_".join(name.split("_")[:2]) for name in network.adapters} == expected
    unet_is_adapted = any("forward" in module.__dict__ for module in tiny[1].modules())
    assert unet_is_adapted == train_unet


def test_a_model_without_any_layer_to_adapt_is_refused():
    with pytest.raises(UserError, match="no adapters"):
        create_network(1.0, 4, 1, None, None, nn.Linear(2, 2))


def test_ranks_and_alphas_by_block(full_size):
    encoders, unet = fresh(full_size)
    dims = ",".join(str(block % 3) for block in range(23))
    alphas = ",".join(str(block + 0.5) for block in range(23))
    network = create_network(1.0, 8, 2, None, encoders, unet, block_dims=dims, block_alphas=alphas)
    sizes = {name: (adapter.rank, adapter.alpha_value) for name, adapter in network.adapters.items()}
    assert sizes["lora_unet_input_blocks_4_1_proj_in"] == (2, 5.5)
    assert sizes["lora_unet_output_blocks_0_1_proj_in"] == (1, 13.5)
    assert "lora_unet_input_blocks_5_1_proj_in" not in sizes
    assert sizes["lora_te1_text_model_encoder_layers_0_mlp_fc1"] == (8, 2.0)


def test_convolution_ranks_by_block_reach_the_3x3_convolutions_alone(full_size):
    encoders, unet = fresh(full_size)
    args = {"block_dims": ",".join(["8"] * 23), "conv_block_dims": ",".join(["2"] * 12 + ["0"] * 11)}
    network = create_network(1.0, 8, 2, None, encoders, unet, **args)
    sizes = {name: (adapter.rank, adapter.alpha_value) for name, adapter in network.adapters.items()}
    assert sizes["lora_unet_input_blocks_4_0_in_layers_2"] == (2, 1.0)
    assert sizes["lora_unet_input_blocks_4_0_skip_connection"] == (8, 2.0)
    assert "lora_unet_output_blocks_2_2_conv" not in sizes


def test_a_block_whose_learning_rate_factor_is_zero_has_no_adapters(full_size):
    encoders, unet = fresh(full_size)
    network = create_network(1.0, 4, 1, None, encoders, unet, down_lr_weight="0", up_lr_weight="sine", mid_lr_weight="0.5")
    blocks = {name.split("_transformer")[0] for name in network.adapters if name.startswith("lora_unet")}
    assert not any("input_blocks" in name for name in blocks)
    assert not any("output_blocks_0_" in name for name in blocks)
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs([0.0], 1e-3, 1e-4)
    assert descriptions == ["unet_block11", *(f"unet_block{block}" for block in range(14, 19))]
    assert groups[0]["lr"] == pytest.approx(0.5e-3)
    assert groups[1]["lr"] == pytest.approx(1e-3 * 0.1950903)


def test_without_rank_and_alpha_they_are_those_that_networks_begin_with(tiny):
    for (rank, alpha), expected in {(None, None): (4, 1.0), (16, 0): (16, 16.0)}.items():
        network = create_network(1.0, rank, alpha, None, *tiny)
        assert {(adapter.rank, adapter.alpha_value) for adapter in network.adapters.values()} == {expected}


def test_the_network_computes_on_the_models_as_they_are(tiny, unet_inputs, randomise):
    """One forward pass equals that of the same model with every weight replaced by W + multiplier·ΔW."""
    encoders, unet = tiny
    network = randomise(create_network(0.7, 4, 2, None, encoders, unet, conv_dim="2"))
    plain = unet(*unet_inputs)
    network.apply_to(encoders, unet)
    adapted = unet(*unet_inputs)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    for adapter in network.adapters.values():
        adapter.layer.weight.data += 0.7 * adapter.delta_weight()
    network.set_enabled(False)
    torch.testing.assert_close(unet(*unet_inputs), adapted, rtol=1e-4, atol=1e-4)
