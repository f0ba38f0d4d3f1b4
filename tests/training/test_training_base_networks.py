"""Networks merged into the base model: the same weights as merging into a loaded model gives, read from the family itself."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.memory.fp8 import SCALED_FLOAT8
from library.memory.packed import PackedTensor
from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from library.options.errors import UserError
from library.options.groups.network import NetworkOptions
from library.training.base_networks import module_of, with_base_weights
from library.training.metadata import base_weights_keys
from networks.lora import create_network, create_network_from_weights

CPU = torch.device("cpu")
Parts = dict[str, nn.Module]


@pytest.fixture(scope="module")
def family(tiny_checkpoint: Path) -> SdxlFamily:
    return SdxlFamily.open(ModelSource(str(tiny_checkpoint)))


def loaded(family: SdxlFamily, dtype: torch.dtype = torch.float32) -> Parts:
    te1, te2 = family.load_text_encoders(dtype, CPU)
    return {"unet": family.load_denoiser(dtype, CPU), "te1": te1, "te2": te2}


@pytest.fixture(scope="module")
def files(family: SdxlFamily, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two LoRA files with strong random weights; the second of the text encoders alone, as a PyTorch file."""
    folder, paths = tmp_path_factory.mktemp("loras"), []
    parts = loaded(family)
    encoders = [parts["te1"], parts["te2"]]
    network = create_network(1.0, 4, 2.0, None, encoders, parts["unet"], conv_dim="2")
    network.apply_to(encoders, parts["unet"])
    for number, name in enumerate(("all.safetensors", "text.pt")):
        draw = torch.Generator().manual_seed(number)
        tensors = {name: torch.randn(tensor.shape, generator=draw) * 0.1 for name, tensor in network.state_dict().items()}
        tensors |= {name: torch.tensor(2.0) for name in tensors if name.endswith("alpha")}
        if name.endswith(".pt"):
            torch.save({name: tensor for name, tensor in tensors.items() if "lora_te" in name}, folder / name)
        else:
            save_file(tensors, folder / name)
        paths.append(str(folder / name))
    return paths


def test_the_weights_are_those_of_a_loaded_model_that_networks_are_merged_into(family: SdxlFamily, files: list[str]) -> None:
    options = NetworkOptions(network_module="networks.lora", base_weights=tuple(files), base_weights_multiplier=(0.5,))
    found, expected = loaded(with_base_weights(family, options)), loaded(family)
    plain = loaded(family)
    for path, strength in zip(files, (0.5, 1.0), strict=True):
        encoders, unet = [expected["te1"], expected["te2"]], expected["unet"]
        network, tensors = create_network_from_weights(strength, path, None, encoders, unet, for_inference=True)
        network.merge_to(encoders, unet, tensors)
    for part, module in found.items():
        wanted, before = expected[part].state_dict(), plain[part].state_dict()
        changed = 0
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
            changed += not torch.equal(tensor, before[name])
        assert changed > 10


def test_caches_of_the_text_encoders_follow_and_those_of_the_vae_stay(family: SdxlFamily, files: list[str]) -> None:
    def prints(*paths: str) -> tuple[str, str]:
        changed = with_base_weights(family, NetworkOptions(base_weights=paths))
        return changed.fingerprint("vae"), changed.fingerprint("text_encoders")

    assert len({prints(*paths)[1] for paths in ((), files[:1], files[1:], files)}) == 4
    assert len({prints(*paths)[0] for paths in ((), files[:1])}) == 1


def test_weights_in_8_bits_are_packed_after_the_network_is_in(family: SdxlFamily, files: list[str]) -> None:
    def hold(layer: nn.Module, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        return PackedTensor.pack(tensor, SCALED_FLOAT8, dtype) if isinstance(layer, nn.Linear) and tensor.ndim == 2 else None

    changed = with_base_weights(family, NetworkOptions(base_weights=(files[0],)))
    packed = changed.load_denoiser(torch.bfloat16, CPU, hold).get_parameter("input_blocks.4.1.proj_in.weight")
    exact = changed.load_denoiser(torch.float32, CPU).get_parameter("input_blocks.4.1.proj_in.weight")
    assert isinstance(packed.data, PackedTensor)
    torch.testing.assert_close(packed.data.unpack(torch.float32), exact, rtol=0.07, atol=1e-3)


def test_a_file_of_another_model_is_refused(family: SdxlFamily, files: list[str], tmp_path: Path) -> None:
    foreign = {f"lora_other_{key.removeprefix('lora_')}": tensor for key, tensor in load_file(files[0]).items()}
    save_file(foreign, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors fits nothing in this model"):
        with_base_weights(family, NetworkOptions(base_weights=(str(tmp_path / "x.safetensors"),)))


class Doubler:
    """A module of another package: it adds the layer's weight to itself, strength times."""

    def __init__(self, layer: nn.Linear) -> None:
        self.org_module = [layer]

    def merge_to(self, multiplier: float) -> None:
        self.org_module[0].weight.data *= 1 + multiplier


@pytest.fixture
def other_package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: Any = ModuleType("other_package")

    def create_network_from_weights(multiplier: float, path: str, vae: Any, encoders: Any, unet: Any, **_: Any) -> Any:
        return SimpleNamespace(unet_loras=[Doubler(unet.time_embed[0])], text_encoder_loras=[]), {}

    module.create_network, module.create_network_from_weights = None, create_network_from_weights
    monkeypatch.setitem(sys.modules, "other_package", module)
    return module


def test_modules_of_other_packages_change_their_layers_with_the_strength_they_are_given(
    family: SdxlFamily, files: list[str], other_package: ModuleType
) -> None:
    options = NetworkOptions(network_module="other_package", base_weights=(files[0],), base_weights_multiplier=(0.5,))
    name = "time_embed.0.weight"
    found = with_base_weights(family, options).load_denoiser(torch.float32, CPU).get_parameter(name)
    torch.testing.assert_close(found, 1.5 * family.load_denoiser(torch.float32, CPU).get_parameter(name))


def test_what_cannot_be_merged_is_refused(family: SdxlFamily, files: list[str], other_package: Any) -> None:
    other_package.create_network_from_weights = lambda *_, **__: (SimpleNamespace(), {})
    with pytest.raises(UserError, match="networks of other_package cannot be merged into the base model"):
        with_base_weights(family, NetworkOptions(network_module="other_package", base_weights=(files[0],)))


def test_a_file_is_read_by_the_module_of_its_kind(files: list[str], tmp_path: Path) -> None:
    save_file({"lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, tmp_path / "loha.safetensors")
    kinds = {module: [module_of(path, module) for path in (files[0], str(tmp_path / "loha.safetensors"))]
             for module in ("networks.lora", "lycoris.kohya", "other_package")}  # fmt: skip
    assert kinds["networks.lora"] == kinds["lycoris.kohya"] == ["networks.lora", "lycoris.kohya"]
    assert kinds["other_package"] == ["other_package"] * 2


def test_files_say_what_was_merged_without_folders() -> None:
    options = NetworkOptions(base_weights=("/home/me/a.safetensors", "b.pt"), base_weights_multiplier=(0.5,))
    assert base_weights_keys(options) == {
        "ss_base_weights": '["a.safetensors", "b.pt"]',
        "ss_base_weights_multiplier": "[0.5, 1.0]",
    }
    assert base_weights_keys(NetworkOptions()) == {}
