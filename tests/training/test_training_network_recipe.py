from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.memory.packed import PackedTensor
from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from library.models.weights import Hold
from library.options.groups.network import NetworkOptions
from library.options.groups.precision import PrecisionOptions
from library.options.scripts import SdxlTrainNetworkOptions
from library.training.accelerator import DTypes
from library.training.network_recipe import NetworkRecipe, make_network, text_encoder_rates


@pytest.mark.parametrize("dim_from_weights", [False, True])
def test_dropout_reaches_the_network_also_when_ranks_come_from_a_file(
    dim_from_weights: bool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    unet = SdxlFamily.open(ModelSource(str(tiny_checkpoint))).load_denoiser(torch.float32, torch.device("cpu"))
    file = tmp_path / "lora.safetensors"
    first = make_network(NetworkOptions(network_module="networks.lora", network_dim=2), None, [], unet)
    first.apply_to([], unet, False, True)
    first.save_weights(str(file), None, None)
    options = NetworkOptions(
        network_module="networks.lora", network_weights=str(file), dim_from_weights=dim_from_weights, network_dropout=0.3
    )
    network = make_network(options, None, [], unet)
    assert {adapter.dropouts.neuron for adapter in network.adapters.values()} == {0.3}


def test_cached_text_leaves_the_unet_alone_to_train_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert text_encoder_rates(NetworkOptions(text_encoder_lr1=1e-5), 1e-4, [None, None]) == [0.0, 0.0]
    assert "the U-Net alone is trained" in caplog.text


def test_each_encoder_has_its_rate_or_the_common_one() -> None:
    encoders = [torch.nn.Identity(), torch.nn.Identity()]
    assert text_encoder_rates(NetworkOptions(text_encoder_lr2=2e-5), 1e-4, encoders) == [1e-4, 2e-5]
    assert text_encoder_rates(NetworkOptions(text_encoder_lr=(1e-5,)), 1e-4, encoders) == [1e-5, 1e-5]
    assert text_encoder_rates(NetworkOptions(network_train_unet_only=True), 1e-4, encoders) == [0.0, 0.0]


def codec_of(hold: Hold | None) -> str | None:
    held = hold and hold(torch.nn.Linear(64, 64), torch.ones(64, 64), torch.bfloat16)
    return held.codec.name if isinstance(held, PackedTensor) else None


@pytest.mark.parametrize(
    ("given", "denoiser", "encoders"),
    [
        ({}, None, None),
        ({"fp8_base_unet": True}, "float8", None),
        ({"fp8_base": True}, "float8", "float8"),
        ({"base_quant": "fp8"}, "float8", "float8"),
        ({"base_quant": "fp8", "fp8_base_unet": True}, "float8", "float8"),
        ({"base_quant": "int8"}, "int8", "int8"),
        ({"base_quant": "nf4"}, "nf4", "int8"),
    ],
)
def test_which_parts_are_held_in_how_many_bits(given: dict[str, Any], denoiser: str | None, encoders: str | None) -> None:
    recipe = NetworkRecipe(SdxlTrainNetworkOptions(precision=PrecisionOptions(**given)))
    parts = recipe.dtypes_of_parts(SimpleNamespace(dtypes=DTypes(torch.bfloat16, torch.float32, torch.bfloat16, None)))
    assert [codec_of(parts.hold_denoiser), codec_of(parts.hold_text_encoders)] == [denoiser, encoders]
    assert parts.denoiser == parts.text_encoders == torch.bfloat16
