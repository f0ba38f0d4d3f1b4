import copy
import os

import pytest
import torch
from torch import nn

from library.files.hashes import sshs_legacy_hash, sshs_model_hash
from library.files.safetensors_io import open_safetensors
from library.options.errors import UserError
from networks.lora import create_network, create_network_from_weights
from networks.lora_files import normalise


def applied(tiny, randomise=None, **options):
    network = create_network(1.0, options.pop("dim", 4), options.pop("alpha", 2), None, *tiny, **options)
    if randomise is not None:
        randomise(network)
    network.apply_to(*tiny)
    return network


def saved(network, path, dtype=None):
    network.save_weights(str(path), dtype, {})
    return str(path)


# --- learning rates -------------------------------------------------------------------------------------------------------------


def groups_of(network, *rates):
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs(*rates)
    return {name: group["lr"] for name, group in zip(descriptions, groups, strict=True)}, groups


def test_each_encoder_and_the_unet_is_a_group_with_its_own_rate(tiny):
    network = applied(tiny)
    rates, groups = groups_of(network, [1e-5, 2e-5], 1e-4, 1e-3)
    assert rates == {"textencoder1": 1e-5, "textencoder2": 2e-5, "unet": 1e-4}
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in network.get_trainable_params()} == {id(p) for p in network.parameters()}
    assert len(grouped) == len({id(p) for p in grouped})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, 1e-3), {"textencoder1": 1e-3, "textencoder2": 1e-3, "unet": 1e-3}),
        (([5e-5], None, 1e-3), {"textencoder1": 5e-5, "textencoder2": 5e-5, "unet": 1e-3}),
        ((5e-5, 1e-4, 1e-3), {"textencoder1": 5e-5, "textencoder2": 5e-5, "unet": 1e-4}),
        (([None, 2e-5], 1e-4, 1e-3), {"textencoder1": 1e-3, "textencoder2": 2e-5, "unet": 1e-4}),
        (([0.0, 2e-5], 0.0, 1e-3), {"textencoder2": 2e-5}),
        ((None, 1e-4, None), {"unet": 1e-4}),
    ],
)
def test_a_rate_that_is_not_given_is_the_default_and_zero_or_none_leaves_a_part_untrained(tiny, given, expected):
    assert groups_of(applied(tiny), *given)[0] == expected


def test_parts_that_are_not_trained_need_no_gradients_and_stay_so(tiny):
    network = applied(tiny)
    groups_of(network, [0.0, 1e-5], 0.0, 1e-3)
    network.prepare_grad_etc(*tiny)
    network.on_epoch_start(*tiny)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {
        name for name, _ in network.named_parameters() if name.startswith("lora_te2")
    }
    assert all(p.requires_grad for p in network.get_trainable_params())


def test_nothing_to_train_and_too_many_rates_are_refused(tiny):
    with pytest.raises(UserError, match="Nothing is trained"):
        groups_of(applied(tiny), None, 0.0, 0.0)
    with pytest.raises(UserError, match="--text_encoder_lr has 3 values; there are 2"):
        groups_of(applied(tiny), [1.0, 1.0, 1.0], 1.0, 1.0)


def test_lora_plus_gives_the_up_matrices_their_own_rate(tiny):
    network = applied(tiny, loraplus_lr_ratio="16", loraplus_text_encoder_lr_ratio="4")
    rates, groups = groups_of(network, [1e-5, 0.0], 1e-4, None)
    assert rates == {
        "textencoder1": 1e-5,
        "textencoder1 plus": pytest.approx(4e-5),
        "unet": 1e-4,
        "unet plus": pytest.approx(16e-4),
    }
    ups = {id(adapter.lora_up.weight) for name, adapter in network.adapters.items() if name.startswith("lora_unet")}
    assert {id(parameter) for parameter in groups[3]["params"]} == ups


def test_the_older_method_gives_both_encoders_one_rate(tiny):
    groups, descriptions = applied(tiny).prepare_optimizer_params(1e-5, 1e-4, 1e-3)
    assert [(group["lr"], name) for group, name in zip(groups, descriptions, strict=True)] == [
        (1e-5, "textencoder1"),
        (1e-5, "textencoder2"),
        (1e-4, "unet"),
    ]


def test_training_changes_the_adapters_and_nothing_else(tiny, unet_inputs):
    _, unet = tiny
    before = copy.deepcopy(unet.state_dict())
    network = applied(tiny)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(0.0, 1e-2, None)
    optimizer = torch.optim.SGD(groups)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = unet(*unet_inputs).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def test_gradient_checkpointing_changes_no_gradient(tiny, unet_inputs, randomise):
    _, unet = tiny
    network = applied(tiny, randomise, module_dropout="0.2", rank_dropout="0.2", dropout="0.2")

    def gradients():
        torch.manual_seed(4)
        network.zero_grad()
        unet(*unet_inputs).square().mean().backward()
        return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    expected = gradients()
    unet.enable_gradient_checkpointing()
    found = gradients()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


# --- files ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["safetensors", "pt"])
def test_a_saved_network_is_loaded_again(tiny, randomise, tmp_path, extension):
    network = applied(tiny, randomise)
    path = saved(network, tmp_path / f"a.{extension}")
    other = create_network(1.0, 4, 2, None, *tiny)
    other.apply_to(*tiny)
    report = other.load_weights(path)
    assert report == ([], [])
    assert str(report) == "every tensor was found"
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in network.state_dict().items())
    assert os.listdir(tmp_path) == [f"a.{extension}"]


def test_the_precision_of_the_file_is_that_of_every_tensor_and_alphas_are_never_integers(tiny, randomise, tmp_path):
    network = applied(tiny, randomise, alpha=1)
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)):
        with open_safetensors(saved(network, tmp_path / "a.safetensors", dtype)) as file:
            assert {info.dtype for info in file.infos.values()} == {expected}
    assert next(network.parameters()).dtype == torch.float32


def test_alphas_survive_half_precision_training(tiny, tmp_path):
    network = applied(tiny, alpha=4.3).to(torch.bfloat16)
    with open_safetensors(saved(network, tmp_path / "a.safetensors")) as file:
        alpha = file["lora_unet_middle_block_1_proj_in.alpha"]
    assert alpha.dtype == torch.float32
    assert alpha.item() == pytest.approx(4.3)
    scales = [adapter.scale for adapter in network.adapters.values()]
    network.load_state_dict(network.state_dict())
    assert [adapter.scale for adapter in network.adapters.values()] == pytest.approx(scales, rel=1e-7)


def test_metadata_and_hashes_are_those_of_the_file(tiny, randomise, tmp_path):
    network = applied(tiny, randomise)
    metadata = {"ss_output_name": "me", "modelspec.title": "t"}
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float16, metadata)
    with open_safetensors(tmp_path / "a.safetensors") as file:
        assert file.metadata == metadata
        assert file.metadata["sshs_model_hash"] == sshs_model_hash(file)
        assert file.metadata["sshs_legacy_hash"] == sshs_legacy_hash(file, {"ss_output_name": "me"})
        assert file.metadata["ss_output_name"] == "me"


def test_a_file_keeps_its_effect_when_training_goes_on_with_another_alpha(tiny, unet_inputs, randomise, tmp_path):
    _, unet = tiny
    network = applied(tiny, randomise, alpha=2)
    path = saved(network, tmp_path / "a.safetensors")
    expected = unet(*unet_inputs)
    network.set_enabled(False)
    again = applied(tiny, alpha=8)
    again.load_weights(path)
    torch.testing.assert_close(unet(*unet_inputs), expected)
    assert {(adapter.rank, adapter.alpha_value) for adapter in again.adapters.values()} == {(4, 2.0)}


def test_another_rank_is_told_with_the_way_out(tiny, randomise, tmp_path):
    path = saved(applied(tiny, randomise, dim=8), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"Set the rank to 8 .* or give --dim_from_weights"):
        applied(tiny, dim=4).load_weights(path)


def test_a_file_of_fewer_or_more_parts_is_loaded_and_the_difference_reported(tiny, randomise, tmp_path):
    network = create_network(1.0, 4, 2, None, *tiny)
    network.apply_to(*tiny, apply_text_encoder=False)
    unet_only = saved(network, tmp_path / "unet.safetensors")
    report = applied(tiny).load_weights(unet_only)
    assert report.missing
    assert all(name.startswith("lora_te") for name in report.missing)
    whole = saved(applied(tiny), tmp_path / "whole.safetensors")
    assert network.load_weights(whole).unexpected
    assert network.load_weights(whole).missing == []


def test_ranks_and_alphas_come_from_a_file_of_mixed_sizes(tiny, unet_inputs, randomise, tmp_path):
    encoders, unet = tiny
    dims = ",".join(str(1 + block % 4) for block in range(23))
    network = applied(tiny, randomise, block_dims=dims, conv_dim="3", conv_alpha="6")
    path = saved(network, tmp_path / "a.safetensors")
    expected = unet(*unet_inputs)
    network.set_enabled(False)
    again, weights = create_network_from_weights(1.0, path, None, encoders, unet, for_inference=True)
    assert {name: a.rank for name, a in again.adapters.items()} == {name: a.rank for name, a in network.adapters.items()}
    again.apply_to(encoders, unet)
    again.load_state_dict(weights)
    torch.testing.assert_close(unet(*unet_inputs), expected)
    again.set_multiplier(0.0)
    plain = unet(*unet_inputs)
    again.set_multiplier(0.5)
    half = unet(*unet_inputs)
    assert not torch.allclose(plain, expected)
    assert not torch.allclose(half, expected)
    assert not torch.allclose(half, plain)


def test_a_file_without_alphas_has_the_rank_as_alpha(tiny, randomise):
    encoders, unet = tiny
    weights = {name: tensor for name, tensor in applied(tiny, randomise).state_dict().items() if not name.endswith(".alpha")}
    network, tensors = create_network_from_weights(1.0, None, None, encoders, unet, weights_sd=weights)
    assert {adapter.scale for adapter in network.adapters.values()} == {1.0}
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")} == {4.0}


def test_dropouts_are_kept_with_ranks_from_a_file_and_left_out_for_inference(tiny, randomise, tmp_path):
    path = saved(applied(tiny, randomise), tmp_path / "a.safetensors")
    trained, _ = create_network_from_weights(1.0, path, None, *tiny, rank_dropout="0.25", dropout=0.5)
    drawn, _ = create_network_from_weights(1.0, path, None, *tiny, for_inference=True)
    adapter = next(iter(trained.adapters.values()))
    assert (adapter.dropouts.rank, adapter.dropouts.neuron) == (0.25, 0.5)
    assert next(iter(drawn.adapters.values())).dropouts.rank == 0


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lora_unet_x.hada_w1_a", "LoHa weights .* lycoris.kohya"),
        ("lora_unet_x.lokr_w1", "LoKr"),
        ("lora_unet_x.dora_scale", "DoRA"),
        ("lora_unet_x.lora_mid.weight", "Tucker"),
        ("oft_unet_x.oft_blocks", "OFT"),
        ("unet.x.lora_A.weight", "diffusers or PEFT"),
        ("lora_unet_x.diff", "full-difference"),
        ("model.diffusion_model.x.weight", "holds no LoRA"),
        ("lora_unet_x.lora_down.weight", "no lora_up"),
    ],
)
def test_files_of_another_kind_are_refused_by_name(name, sentence):
    with pytest.raises(UserError, match=sentence):
        normalise({name: torch.zeros(1)}, "a.safetensors")


def test_a_lora_of_another_model_is_refused_and_single_strangers_are_reported(tiny, randomise, caplog):
    encoders, unet = tiny
    strange = {
        "lora_unet_double_blocks_0.lora_down.weight": torch.zeros(2, 3),
        "lora_unet_double_blocks_0.lora_up.weight": torch.zeros(3, 2),
    }
    with pytest.raises(UserError, match="fits nothing in this model: it names lora_unet_double_blocks_0"):
        create_network_from_weights(1.0, None, None, encoders, unet, weights_sd=strange)
    both = dict(applied(tiny, randomise).state_dict()) | strange
    create_network_from_weights(1.0, None, None, encoders, unet, weights_sd=both)
    assert "adapters are not in this model and are left out, lora_unet_double_blocks_0 first" in caplog.text


# --- merging --------------------------------------------------------------------------------------------------------------------


def test_merging_a_file_with_a_multiplier_equals_running_it_beside_the_model(tiny, unet_inputs, randomise, tmp_path):
    encoders, unet = tiny
    network = applied(tiny, randomise, conv_dim="2")
    path = saved(network, tmp_path / "a.safetensors")
    network.set_multiplier(0.5)
    expected = unet(*unet_inputs)
    hidden = encoders[1](torch.tensor([[5, 6, 7]]))[0]
    network.set_enabled(False)
    merged, weights = create_network_from_weights(0.5, path, None, encoders, unet, for_inference=True)
    merged.merge_to(encoders, unet, weights, None, "cpu")
    torch.testing.assert_close(unet(*unet_inputs), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoders[1](torch.tensor([[5, 6, 7]]))[0], hidden, rtol=1e-4, atol=1e-4)


def test_merging_adds_in_float32_and_stores_what_was_asked_for():
    layer = nn.Linear(4, 4, bias=False).half()
    layer.weight.data.fill_(1.0)
    unet = nn.Module()
    unet.add_module("t", type("Transformer2DModel", (nn.Sequential,), {})(layer))
    weights = {"lora_unet_t_0.lora_down.weight": torch.full((1, 4), 2.0), "lora_unet_t_0.lora_up.weight": torch.full((4, 1), 0.25)}
    network, tensors = create_network_from_weights(0.5, None, None, None, unet, weights_sd=weights)
    network.merge_to(None, unet, tensors, None, "cpu")
    assert layer.weight.dtype == torch.float16
    assert torch.equal(layer.weight, torch.full((4, 4), 1.25).half())
    network.merge_to(None, unet, tensors, torch.bfloat16, "cpu")
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight[0, 0] == 1.5


def test_merging_for_speed_is_undone_to_the_bit(tiny, unet_inputs, randomise):
    _, unet = tiny
    network = applied(tiny, randomise, conv_dim="2")
    before = copy.deepcopy(unet.state_dict())
    expected = unet(*unet_inputs)
    network.backup_weights()
    network.pre_calculation()
    torch.testing.assert_close(unet(*unet_inputs), expected, rtol=1e-4, atol=1e-4)
    network.restore_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert torch.equal(unet(*unet_inputs), expected)


# --- norms ----------------------------------------------------------------------------------------------------------------------


def test_limiting_norms_equals_the_reference(reference, fill):
    values = reference["max_norm"]
    shapes = {"a": ((2, 6), (5, 2), 1.0, 1.0), "b": ((2, 6), (5, 2), 0.05, 2.0), "c": ((2, 3, 3, 3), (4, 2, 1, 1), 1.0, 2.0)}
    shapes["z"] = ((2, 6), (5, 2), 1.0, 1.0)
    unet = nn.Module()
    blocks = {name: nn.Linear(6, 5) if len(down) == 2 else nn.Conv2d(3, 4, 3) for name, (down, _, _, _) in shapes.items()}
    unet.add_module("r", type("ResnetBlock2D", (nn.ModuleDict,), {})(blocks))
    weights = {}
    for name, (down, up, k, alpha) in shapes.items():
        weights[f"lora_unet_r_{name}.lora_down.weight"] = fill(down, k)
        weights[f"lora_unet_r_{name}.lora_up.weight"] = fill(up, k) * (name != "z")
        weights[f"lora_unet_r_{name}.alpha"] = torch.tensor(alpha)
    network, weights = create_network_from_weights(1.0, None, None, None, unet, weights_sd=weights)
    network.apply_to(None, unet)
    network.load_state_dict(weights)
    report = network.apply_max_norm_regularization(values["limit"], "cpu")
    assert [float(value) for value in report] == pytest.approx(list(values["returned"].values()), abs=1e-6)
    state = network.state_dict()
    for name, first_four in values["first_four_values_after"].items():
        torch.testing.assert_close(state[f"lora_unet_r_{name}"].flatten()[:4], torch.tensor(first_four), rtol=0, atol=1e-6)
    for name, norm in values["norms_before"].items():
        adapter = network.adapters[f"lora_unet_r_{name}"]
        assert adapter.delta_weight().norm().item() == pytest.approx(min(norm, 1.0), abs=1e-5)
    assert float(network.apply_max_norm_regularization(1.001, "cpu").scaled) == 0
