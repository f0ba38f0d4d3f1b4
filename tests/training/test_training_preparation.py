"""What is encoded before training: models are loaded where they are needed, and no earlier."""

import logging
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from library.dataset.dataset import Dataset
from library.diffusion.objective import DdpmObjective
from library.diffusion.schedule import NoiseSchedule
from library.models.weights import Hold
from library.options.groups.cache import CacheOptions
from library.options.groups.model import ModelOptions
from library.options.groups.precision import TrainingPrecisionOptions, VaePrecisionOptions
from library.options.scripts import TrainingOptions
from library.training import preparation
from library.training.accelerator import DTypes
from library.training.denoiser import load_denoiser
from library.training.events import EventLog
from library.training.outputs import RunLength
from library.training.preparation import model_source, prepare_latents, prepare_text, tell_of_tiles
from library.training.setting import PartDTypes, Setting
from tests.dataset.dataset_samples import FakeFamily, FakeVae, config, make_image, section, subset

ROOT = Path(__file__).parents[2]
FLOAT = PartDTypes(torch.float32, torch.float32)
DISK = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
MEMORY = {"cache_latents": True, "cache_text_encoder_outputs": True}


class LoadingFamily(FakeFamily):
    """Notes what is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def load_vae(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        self.loaded.append("vae")
        return FakeVae()

    def load_text_encoders(self, dtype: torch.dtype, device: torch.device, hold: Hold | None = None) -> list[nn.Module]:
        self.loaded.append("text encoders" if hold is None else "packed text encoders")
        return [nn.Identity(), nn.Identity()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a picture\n")
    return tmp_path


def setting(folder: Path, family: LoadingFamily, **caching: Any) -> Setting:
    options = TrainingOptions(cache=CacheOptions(**caching), model=ModelOptions(pretrained_model_name_or_path="x"))
    dtypes = DTypes(torch.float32, torch.float32, torch.float32, None)
    dataset = Dataset(config(section(subset(folder))), 1)
    objective = DdpmObjective(NoiseSchedule.make(), False, options.noise, options.loss)
    length = RunLength.of(1, 1, 1, None)
    return Setting(options, Accelerator(cpu=True), dtypes, 1, family, objective, dataset, 1, length, 0.0, EventLog())


def test_without_caches_everything_is_loaded(folder: Path) -> None:
    family = LoadingFamily()
    plain = setting(folder, family)
    assert len(prepare_text(plain, [], FLOAT).encoders) == 2
    assert prepare_latents(plain, keep=False) is not None
    assert family.loaded == ["text encoders", "vae"]


@pytest.mark.parametrize(
    ("brings", "expected"),
    [({"brings_texts"}, ["vae"]), ({"brings_latents"}, ["text encoders"]), ({"brings_texts", "brings_latents"}, [])],
)
def test_what_comes_with_the_batches_needs_no_model(folder: Path, brings: set[str], expected: list[str]) -> None:
    family = LoadingFamily()
    plain = setting(folder, family)
    for name in brings:
        setattr(plain.dataset, name, True)
    assert (prepare_text(plain, [], FLOAT).encoders == [None, None]) == ("brings_texts" in brings)
    assert (prepare_latents(plain, keep=False) is None) == ("brings_latents" in brings)
    assert family.loaded == expected


def test_only_text_encoders_that_stay_are_held_in_fewer_bits(folder: Path) -> None:
    dtypes = PartDTypes(torch.float32, torch.float32, hold_text_encoders=lambda owner, tensor, dtype: None)
    for caching, expected in (({}, "packed text encoders"), (MEMORY, "text encoders")):
        family = LoadingFamily()
        prepare_text(setting(folder, family, **caching), [], dtypes)
        assert family.loaded == [expected]


class Watched(nn.Module):
    """Notes where it is moved."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.moves = inner, []

    def to(self, *args: Any) -> "Watched":
        self.moves.append(args)
        return self

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("inner",) else getattr(super().__getattr__("inner"), name)


class WatchingFamily(LoadingFamily):
    """Notes what is alive when the denoiser is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[weakref.ref[nn.Module]] = []
        self.alive: list[nn.Module] = []
        self.attention = ""

    def load_vae(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        vae = Watched(super().load_vae(dtype, device))
        self.given.append(weakref.ref(vae))
        return vae

    def load_text_encoders(self, dtype: torch.dtype, device: torch.device, hold: Hold | None = None) -> list[nn.Module]:
        encoders = super().load_text_encoders(dtype, device, hold)
        self.given += map(weakref.ref, encoders)
        return encoders

    def load_denoiser(self, dtype: torch.dtype, device: torch.device, hold: Hold | None = None) -> nn.Module:
        self.alive = [module for ref in self.given if (module := ref()) is not None]
        return nn.Linear(1, 1)

    def set_attention(self, denoiser: nn.Module, kind: str) -> None:
        self.attention = kind


@pytest.mark.parametrize("keep", [False, True])
def test_encoders_and_vae_have_left_the_device_before_the_denoiser_comes(folder: Path, keep: bool) -> None:
    family = WatchingFamily()
    cached = setting(folder, family, **MEMORY)
    text, vae = prepare_text(cached, [], FLOAT), prepare_latents(cached, keep=keep)
    load_denoiser(cached, FLOAT)
    assert len(family.given) == 3 and text.encoders == [None, None]
    assert family.alive == ([vae] if keep else [])
    assert not keep or vae.moves == [("cpu",)]


def test_the_vae_stays_on_the_device_where_main_memory_is_short(folder: Path) -> None:
    cached = setting(folder, WatchingFamily(), **MEMORY)
    model = ModelOptions(pretrained_model_name_or_path="x", lowram=True)
    vae = prepare_latents(replace(cached, options=replace(cached.options, model=model)), keep=True)
    assert vae is not None and vae.moves == []


@pytest.mark.parametrize(("caching", "second"), [(DISK, []), (MEMORY, ["text encoders", "vae"])])
def test_nothing_is_loaded_where_every_entry_is_on_the_disk(folder: Path, caching: dict[str, bool], second: list[str]) -> None:
    for expected in (["text encoders", "vae"], second):
        family = LoadingFamily()
        cached = setting(folder, family, **caching)
        text = prepare_text(cached, [], FLOAT)
        assert text.encoders == [None, None]
        assert text.prompts == []
        assert prepare_latents(cached, keep=False) is None
        assert family.loaded == expected


def test_sample_images_get_their_models_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FakePipeline:
        def __init__(self, family: Any, components: Any, **more: Any) -> None:
            self.components = components

        def encode(self, requests: Any) -> list[Any]:
            return [(request, len(self.components.text_encoders)) for request in requests]

    monkeypatch.setattr(preparation, "Pipeline", FakePipeline)
    for _ in range(2):
        family = LoadingFamily()
        cached = setting(folder, family, **DISK)
        text = prepare_text(cached, ["a prompt"], FLOAT)  # type: ignore[list-item]
        assert text.prompts == [("a prompt", 2)]
        assert isinstance(prepare_latents(cached, keep=True), FakeVae)
        assert family.loaded == ["text encoders", "vae"]


def test_the_posterior_is_cached_where_it_is_asked_for(folder: Path) -> None:
    for posterior in (False, True):
        cached = setting(folder, LoadingFamily(), cache_latents_posterior=posterior, **DISK)
        prepare_latents(cached, keep=False)
        with np.load(folder / "a_0064x0064_sdxl.npz") as archive:
            assert ("latents_posterior" in archive.files) == posterior
    latents, item = cached.dataset.latents, cached.dataset.items[0]
    assert latents is not None
    assert not torch.equal(latents.read(item, flipped=False, seed=1), latents.read(item, flipped=False, seed=2))


def test_one_line_tells_what_was_done(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        cached = setting(folder, LoadingFamily(), **DISK)
        prepare_text(cached, [], FLOAT)
        prepare_latents(cached, keep=False)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("library")] == [
        "Captions: none in the cache, 1 encoded (1 new).",
        "Latents: none in the cache, 1 encoded (1 new).",
        "Captions: 1 taken from the cache, nothing to encode.",
        "Latents: 1 taken from the cache, nothing to encode.",
    ]


def test_a_vae_kept_in_float32_is_read_and_computed_in_float32_whatever_the_rest_is() -> None:
    precision = TrainingPrecisionOptions(mixed_precision="fp16", full_fp16=True, no_half_vae=True)
    assert DTypes.of(precision, precision.no_half_vae, None).vae == torch.float32
    source = model_source(ModelOptions(pretrained_model_name_or_path="x"), precision)
    assert source.prefer_fp16_variant and source.keep_vae_precision
    halved = precision.model_copy(update={"no_half_vae": False})
    assert DTypes.of(halved, halved.no_half_vae, None).vae == torch.float16
    assert not model_source(ModelOptions(pretrained_model_name_or_path="x"), halved).keep_vae_precision


def test_the_attention_that_is_asked_for_reaches_the_denoiser(folder: Path) -> None:
    for flags, kind in (({}, "sdpa"), ({"sdpa": True}, "sdpa"), ({"mem_eff_attn": True, "xformers": True}, "mem_eff_attn")):
        plain = setting(folder, family := WatchingFamily())
        options = replace(plain.options, precision=TrainingPrecisionOptions(**flags))
        load_denoiser(replace(plain, options=options), FLOAT)
        assert family.attention == kind


@pytest.mark.parametrize(("side", "is_told"), [(1024, True), (1088, False)])
def test_tiles_that_no_picture_is_large_enough_for_are_told(side: int, is_told: bool, caplog: pytest.LogCaptureFixture) -> None:
    dataset: Any = SimpleNamespace(buckets={(0, (512, side)): [0]})
    tell_of_tiles(dataset, SimpleNamespace(vae_tile=1024), VaePrecisionOptions(vae_tiling=True))  # type: ignore[arg-type]
    assert ("--vae_tiling has no effect" in caplog.text) == is_told
    caplog.clear()
    tell_of_tiles(dataset, SimpleNamespace(vae_tile=1024), VaePrecisionOptions())  # type: ignore[arg-type]
    assert not caplog.text


def test_what_a_run_with_all_caches_needs_is_there_without_the_packages_that_encode(tiny_checkpoint: Path) -> None:
    code = (
        "import sys, torch\n"
        "import networks.lora, library.training.network_recipe, library.training.recipe\n"
        "from library.models.family import ModelSource\n"
        "from library.models.sdxl.family import SdxlFamily\n"
        "family = SdxlFamily.open(ModelSource(sys.argv[1]))\n"
        "family.load_denoiser(torch.float32, torch.device('cpu'))\n"
        "assert family.count_tokens(['a cat']) == [2]\n"
        "heavy = 'transformers diffusers bitsandbytes torchvision peft open_clip scipy matplotlib tensorboard huggingface_hub'\n"
        "heavy = {*heavy.split(), 'wandb', 'torch._dynamo', 'torch.distributed.fsdp', 'torch.distributed.tensor'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_checkpoint)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
