"""The table of what is trained, and what keeps a part from training with another's rate."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.models.sdxl.family import SdxlFamily
from library.optim.rate_course import RateCourse
from library.options.checks import find_notes, find_problems
from library.options.checks_rates import network_rates
from library.options.errors import UserError
from library.options.groups.cache import CacheOptions
from library.options.groups.finetune import FinetuneOptions
from library.options.groups.network import NetworkOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.scripts import SdxlTrainNetworkOptions, SdxlTrainOptions
from library.training.network_recipe import freeze_others, parameter_groups
from library.training.setting import Trained
from library.training.trained_table import group_table, part_of_group

TITLES = SdxlFamily.part_titles


class Network(nn.Module):
    """As another package makes one: a tensor for each part, and one rate for all text encoders."""

    def __init__(self, groups: Sequence[tuple[str, dict[str, Any]]] | None = None) -> None:
        super().__init__()
        self.lora_te1_mlp, self.lora_te2_mlp, self.lora_unet_out = nn.Linear(2, 3), nn.Linear(2, 5), nn.Linear(7, 1)
        self._groups = groups

    def prepare_optimizer_params(self, text_encoder_lr: float, unet_lr: float, default: float) -> list[dict[str, Any]]:
        if self._groups is not None:
            return [{"params": getattr(self, name).parameters(), **rest} for name, rest in self._groups]
        texts = [*self.lora_te1_mlp.parameters(), *self.lora_te2_mlp.parameters()]
        return [{"params": texts, "lr": text_encoder_lr}, {"params": self.lora_unet_out.parameters(), "lr": unet_lr}]


def table(network: nn.Module, groups: list[dict[str, Any]], names: Sequence[str | None], courses: Any) -> list[list[str]]:
    trained = Trained(SimpleNamespace(module=network), groups, names, True, ".safetensors")
    return [line.split() for line in group_table(trained, TITLES, courses)]


def test_the_table_tells_part_size_and_rates_of_each_group() -> None:
    network = Network()
    groups, _ = parameter_groups(network, [1e-5, 1e-5], 1e-4, 1.0)
    network.lora_te2_mlp.bias.requires_grad_(False)
    courses = [RateCourse(0.0, 1e-5, 1.25e-8), RateCourse(0.0, 1e-4, 1.25e-7)]
    heading, *rows = table(network, groups, [None, "unet"], courses)
    assert " ".join(heading) == "group part tensors parameters lr first lr highest lr last"
    assert rows == [
        ["group0", "CLIP-L", "+", "OpenCLIP", "bigG", "3", "19", "0", "1e-05", "1.25e-08"],
        ["unet", "U-Net", "2", "8", "0", "0.0001", "1.25e-07"],
        ["all", "5", "27"],
    ]
    assert table(network, groups, [], None)[1][-3:] == ["auto"] * 3


def test_a_group_that_its_package_says_nothing_of_is_trained_too() -> None:
    network = Network()
    both = network.prepare_optimizer_params(1e-5, 1e-4, 1.0)
    network.prepare_optimizer_params = lambda *rates: (both, ["text"])  # type: ignore[method-assign]
    groups, names = parameter_groups(network, [1e-5, 1e-5], 1e-4, 1.0)
    assert ([group["lr"] for group in groups], names) == ([1e-5, 1e-4], ["text", None])


def test_columns_stand_below_each_other() -> None:
    network = Network()
    groups, _ = parameter_groups(network, [1e-5, 1e-5], 1e-4, 1.0)
    trained = Trained(SimpleNamespace(module=network), groups, ["textencoder", "unet"], True, ".safetensors")
    lines = group_table(trained, TITLES, [RateCourse(1e-5, 1e-5, 1e-5)] * 2)
    assert len({len(line) for line in lines[:-1]}) == 1


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["unet.input_blocks.0.weight"], "U-Net"),
        (["te2.text_model.x", "te2.text_projection"], "OpenCLIP bigG"),
        (["lora_te2_text_model_x.lora_down.weight", "lora_te1_x.alpha"], "CLIP-L + OpenCLIP bigG"),
        (["shared.weight", "lora_unet_x.weight"], "U-Net"),
        (["shared.weight"], "network"),
    ],
)
def test_parts_are_known_by_the_names_of_their_parameters(names: list[str], part: str) -> None:
    assert part_of_group(names, TITLES) == part


def test_one_rate_for_both_encoders_is_refused_where_they_were_given_different_ones() -> None:
    with pytest.raises(UserError, match=r"Network has one learning rate for all text encoders, but 1e-05 and 0\.0005 were asked"):
        parameter_groups(Network(), [1e-5, 5e-4], 1e-4, 1.0)
    with pytest.raises(UserError, match=r"but 0 and 0\.0005 were asked for"):
        parameter_groups(Network(), [0.0, 5e-4], 1e-4, 1.0)


def test_a_group_without_a_rate_gets_the_one_that_was_asked_for_everything_and_no_other() -> None:
    network = Network([("lora_te1_mlp", {}), ("lora_unet_out", {"lr": None})])
    groups, _ = parameter_groups(network, [3e-4, 3e-4], 3e-4, 2e-6)
    assert [group["lr"] for group in groups] == [3e-4, 3e-4]
    with pytest.raises(UserError, match=r"without a learning rate, .* 0\.0001 and 0\.0003 were asked for"):
        parameter_groups(network, [3e-4, 3e-4], 1e-4, 2e-6)


def test_a_group_with_the_rate_0_is_frozen() -> None:
    network = Network()
    groups, names = parameter_groups(network, [0.0, 0.0], 1e-4, 1.0)
    freeze_others(network, groups)
    assert len(groups) == len(names) == 1
    assert {name for name, parameter in network.named_parameters() if parameter.requires_grad} == {
        "lora_unet_out.weight",
        "lora_unet_out.bias",
    }
    with pytest.raises(UserError, match="all learning rates are 0"):
        parameter_groups(network, [0.0, 0.0], 0.0, 1.0)


def network_options(
    optimizer: str = "", cached: bool = False, rate: float | None = None, **network: Any
) -> SdxlTrainNetworkOptions:
    chosen = {"optimizer_type": optimizer} | ({} if rate is None else {"learning_rate": rate})
    return SdxlTrainNetworkOptions(
        optimizer=OptimizerOptions(**chosen),
        network=NetworkOptions(**network),
        cache=CacheOptions(cache_text_encoder_outputs=cached),
    )


@pytest.mark.parametrize(
    ("network", "cached", "rates"),
    [
        ({}, False, {"unet_lr": 1.0, "text_encoder_lr1": 1.0, "text_encoder_lr2": 1.0}),
        ({"text_encoder_lr": (0.5, 0.0)}, False, {"unet_lr": 1.0, "text_encoder_lr1": 0.5, "text_encoder_lr2": 0.0}),
        ({"unet_lr": 0.5}, True, {"unet_lr": 0.5}),
        ({"network_train_text_encoder_only": True}, False, {"text_encoder_lr1": 1.0, "text_encoder_lr2": 1.0}),
    ],
)
def test_the_rates_of_a_network_are_known_before_anything_is_loaded(network, cached, rates) -> None:
    assert network_rates(network_options(rate=1.0, cached=cached, **network)) == rates


def test_prodigy_with_different_rates_is_refused_before_anything_is_loaded() -> None:
    words = "Prodigy finds one rate for everything"
    different = network_options("Prodigy", rate=1.0, text_encoder_lr=(0.5,))
    assert any(words in problem for problem in find_problems(different))
    alike = network_options("Prodigy", rate=1.0, text_encoder_lr=(0.5,), network_train_unet_only=True)
    assert not any(words in problem for problem in find_problems(alike))
    blocks = ",".join(["1"] * 22 + ["0.5"])
    model = SdxlTrainOptions(
        optimizer=OptimizerOptions(optimizer_type="Prodigy", learning_rate=1.0),
        finetune=FinetuneOptions(block_lr=blocks),
    )
    assert any(words in problem for problem in find_problems(model))


def test_a_part_left_to_the_default_rate_is_told() -> None:
    (note,) = [note for note in find_notes(network_options(unet_lr=1e-4)) if "default rate" in note]
    assert "--text_encoder_lr1 and --text_encoder_lr2 and --learning_rate are not given" in note
    for quiet in (network_options(unet_lr=1e-4, rate=2e-6), network_options(), network_options(unet_lr=1e-4, cached=True)):
        assert not any("default rate" in note for note in find_notes(quiet))


def test_torch_fills_in_no_rate_of_its_own() -> None:
    groups, _ = parameter_groups(Network([("lora_unet_out", {})]), [0.0, 0.0], 1e-4, 2e-6)
    assert torch.optim.AdamW(groups, lr=2e-6).param_groups[0]["lr"] == 1e-4
