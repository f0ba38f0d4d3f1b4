"""Networks on a model: beside the weights, merged, folded in before each batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import CPU, difference, load_components

from library.generation.network_files import NetworkFile, planned_networks
from library.generation.networks import AttachedNetworks, attach_networks
from library.generation.pipeline import Pipeline
from library.generation.request import ImageRequest
from library.models.family import Components
from library.options.errors import UsageError, UserError
from library.options.groups.generation import GenNetworkOptions
from networks.lora import create_network

REQUEST = ImageRequest("a red cat", "dog", width=64, height=64, steps=3, cfg_scale=5.0, seed=7, sampler="euler")


def save_lora(path: Path, components: Components, seed: int) -> None:
    """Write a LoRA for all parts with random, strong weights."""
    network = create_network(1.0, 4, 2.0, None, components.text_encoders, components.denoiser)
    network.apply_to(components.text_encoders, components.denoiser)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    network.save_weights(str(path), None, {})


@pytest.fixture(scope="module")
def loras(family, tmp_path_factory) -> list[str]:
    """Two LoRA files for the tiny model."""
    folder = tmp_path_factory.mktemp("loras")
    for number in (1, 2):
        save_lora(folder / f"lora{number}.safetensors", load_components(family), number)
    return [str(folder / f"lora{number}.safetensors") for number in (1, 2)]


def draw(family, files: list[NetworkFile], strengths=None, *, precalculate: bool = False):
    components = load_components(family)
    attached = attach(components, files, precalculate=precalculate)
    attached.set_strengths(strengths)
    return Pipeline(family, components, device=CPU).draw([REQUEST])[0]


def attach(components: Components, files: list[NetworkFile], *, precalculate: bool = False) -> AttachedNetworks:
    return attach_networks(
        files, components, dtype=torch.float32, device=CPU, precalculate=precalculate, show_metadata=False
    )  # fmt: skip


def file(path: str, multiplier: float = 1.0, *, merge: bool = False) -> NetworkFile:
    return NetworkFile("networks.lora", path, multiplier, {}, merge)


@pytest.fixture(scope="module")
def plain(family):
    return draw(family, [])


def test_a_network_changes_the_picture_and_at_strength_0_does_not(family, loras, plain):
    assert difference(draw(family, [file(loras[0])]), plain) > 2
    assert difference(draw(family, [file(loras[0], 0.0)]), plain) == 0


def test_merged_folded_in_and_beside_the_weights_draw_the_same_picture(family, loras, plain):
    files = [file(loras[0], 0.7), file(loras[1], -0.4)]
    beside = draw(family, files)
    assert difference(beside, plain) > 2
    assert difference(draw(family, [replace(each, merge=True) for each in files]), beside) < 0.1
    assert difference(draw(family, [replace(files[0], merge=True), files[1]]), beside) < 0.1
    assert difference(draw(family, files, precalculate=True), beside) < 0.1


def test_strengths_of_a_picture_address_the_live_networks_and_the_last_one_counts_for_the_rest(family, loras):
    expected = draw(family, [file(loras[0], 0.5), file(loras[1], 0.5)])
    assert difference(draw(family, [file(loras[0]), file(loras[1])], (0.5,)), expected) == 0
    merged_first = [file(loras[0], 0.5, merge=True), file(loras[1])]
    assert difference(draw(family, merged_first, (0.5,)), expected) < 0.1


@pytest.mark.parametrize("precalculate", [False, True])
def test_changing_strengths_leaves_no_trace(family, loras, precalculate):
    components = load_components(family)
    attached = attach(components, [file(loras[0]), file(loras[1], 0.3)], precalculate=precalculate)
    pipeline = Pipeline(family, components, device=CPU)
    assert attached.set_strengths(None) == {"lora1": 1.0, "lora2": 0.3}
    first = pipeline.draw([REQUEST])[0]
    assert attached.set_strengths((0.2, 0.9)) == {"lora1": 0.2, "lora2": 0.9}
    assert difference(pipeline.draw([REQUEST])[0], first) > 1
    attached.set_strengths(None)
    assert difference(pipeline.draw([REQUEST])[0], first) == 0


def test_a_file_of_another_model_is_told(family, loras, tmp_path):
    foreign = {f"lora_other_{key.removeprefix('lora_')}": tensor for key, tensor in load_file(loras[0]).items()}
    save_file(foreign, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x.safetensors fits nothing in this model: it names lora_other_"):
        attach(load_components(family), [file(str(tmp_path / "x.safetensors"))])


def test_networks_are_planned_in_the_order_of_the_command_line(tmp_path):
    paths = tuple(str(tmp_path / name) for name in ("a.safetensors", "b.safetensors", "c.safetensors"))
    for path in paths:
        Path(path).touch()
    options = GenNetworkOptions(
        network_module=("networks.lora",) * 3,
        network_weights=paths,
        network_mul=(0.5,),
        network_args=("x=1;y=2",),
        network_merge_n_models=2,
    )
    assert planned_networks(options) == [
        NetworkFile("networks.lora", paths[0], 0.5, {"x": "1", "y": "2"}, merge=True),
        NetworkFile("networks.lora", paths[1], 1.0, {}, merge=True),
        NetworkFile("networks.lora", paths[2], 1.0, {}, merge=False),
    ]
    assert all(each.merge for each in planned_networks(options.model_copy(update={"network_merge": True})))


def test_missing_files_and_modules_and_wrong_arguments_are_told_together(tmp_path):
    options = GenNetworkOptions(
        network_module=("networks.lroa",), network_weights=(str(tmp_path / "no.safetensors"),), network_args=("x",)
    )
    with pytest.raises(UsageError) as raised:
        planned_networks(options)
    told = "\n".join(raised.value.problems)
    assert len(raised.value.problems) == 3
    assert "no.safetensors: there is no such file" in told
    assert "--network_module networks.lroa: there is no such module" in told
    assert "'x' is not of the form key=value" in told
