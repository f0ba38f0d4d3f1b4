"""A model in every layout: what was not trained is written as it was read, and nothing is lost on the way there and back."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.generation.pipeline import Pipeline
from library.generation.request import ImageRequest
from library.models.family import Components, ModelSource
from library.models.sdxl.build import build_unet
from library.models.sdxl.family import SdxlFamily
from library.models.sdxl.single_file import PREFIXES
from library.models.sdxl.sizes import SdxlSizes
from library.options.errors import UserError

CPU = torch.device("cpu")
REFERENCE = json.loads((Path(__file__).parents[1] / "compat" / "training_reference_values.json").read_text(encoding="utf-8"))
LAYOUTS = {"safetensors": "m.safetensors", "ckpt": "m.ckpt", "diffusers": "folder", "diffusers_safetensors": "folder"}


def open_model(path: Path) -> SdxlFamily:
    return SdxlFamily.open(ModelSource(str(path)))


def save(family: SdxlFamily, path: Path, layout: str, trained=None, **options: object) -> None:
    defaults = {"dtype": None, "metadata": {}, "v_prediction": False, "zero_terminal_snr": False}
    family.save_model(path, layout, trained or {}, **defaults | options)


def tensors_of(family: SdxlFamily) -> dict[str, torch.Tensor]:
    return {f"{part} {name}": entry.read() for part, entries in family.checkpoint.parts.items() for name, entry in entries.items()}


@pytest.fixture
def mixed_file(tiny_file: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with parts of different number types, as merged models have them."""
    dtypes = {"unet": torch.float16, "te1": torch.float32, "te2": torch.bfloat16, "vae": torch.float32}
    tensors = load_file(tiny_file)
    for part, prefix in PREFIXES.items():
        tensors |= {name: tensor.to(dtypes[part]) for name, tensor in tensors.items() if name.startswith(prefix)}
    tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(1.25)
    path = tmp_path / "mixed.safetensors"
    save_file(tensors, path, {"format": "pt", "note": "kept"})
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_not_trained_is_written_bit_for_bit_and_what_was_is_not(mixed_file, tmp_path, layout) -> None:
    family = open_model(mixed_file)
    before = tensors_of(family)
    trained = {"unet": {"out.2.weight": torch.full_like(before["unet out.2.weight"], 0.5, dtype=torch.float32)}}
    save(family, tmp_path / LAYOUTS[layout], layout, trained)
    after = tensors_of(open_model(tmp_path / LAYOUTS[layout]))
    assert after.keys() == before.keys()
    changed = {name for name, tensor in before.items() if after[name].dtype != tensor.dtype or not torch.equal(after[name], tensor)}
    assert changed == {"unet out.2.weight"}
    assert torch.equal(after["unet out.2.weight"], trained["unet"]["out.2.weight"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_number_type_that_was_asked_for_is_that_of_all_weights(mixed_file, tmp_path, layout) -> None:
    save(open_model(mixed_file), tmp_path / LAYOUTS[layout], layout, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in tensors_of(open_model(tmp_path / LAYOUTS[layout])).values()} == {torch.bfloat16}


@pytest.mark.parametrize("layout", ["ckpt", "diffusers", "diffusers_safetensors"])
def test_a_file_that_went_through_another_layout_comes_back_with_the_same_tensors(mixed_file, tmp_path, layout) -> None:
    save(open_model(mixed_file), tmp_path / LAYOUTS[layout], layout)
    save(open_model(tmp_path / LAYOUTS[layout]), tmp_path / "again.safetensors", "safetensors")
    before, after = load_file(mixed_file), load_file(tmp_path / "again.safetensors")
    assert after.keys() == before.keys()
    if layout == "ckpt":
        before.pop("conditioner.embedders.1.model.logit_scale"), after.pop("conditioner.embedders.1.model.logit_scale")
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_that_shapes_do_not_tell_and_the_prediction_survive_every_layout(tiny_file, tmp_path, layout) -> None:
    told = {"arch.unet.head_dim": "32", "arch.te1.heads": "2", "arch.te2.act": "quick_gelu", "arch.vae.scaling_factor": "0.2"}
    save_file(load_file(tiny_file), tmp_path / "told.safetensors", told)
    family = open_model(tmp_path / "told.safetensors")
    save(family, tmp_path / LAYOUTS[layout], layout, v_prediction=True, zero_terminal_snr=True)
    again = open_model(tmp_path / LAYOUTS[layout])
    assert again.sizes == family.sizes
    assert again.declared_prediction() == "v" and again.declares_zero_terminal_snr()


@pytest.mark.parametrize("layout", ["diffusers", "diffusers_safetensors"])
def test_diffusers_opens_the_folder_and_draws_our_picture(tiny_file, tmp_path, layout) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    family = open_model(tiny_file)
    save(family, tmp_path / "folder", layout)
    theirs = StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "folder"), local_files_only=True)
    theirs.scheduler = EulerDiscreteScheduler.from_config(theirs.scheduler.config, timestep_spacing="linspace")
    theirs.set_progress_bar_config(disable=True)
    request = ImageRequest("a cat on a table", width=64, height=64, steps=3, cfg_scale=5.0, seed=5, sampler="euler")
    components = Components(
        family.load_denoiser(torch.float32, CPU),
        family.load_vae(torch.float32, CPU),
        list(family.load_text_encoders(torch.float32, CPU)),
    )
    ours = Pipeline(family, components, device=CPU).draw([request])[0]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    picture = theirs(
        request.prompt, negative_prompt="", width=64, height=64, num_inference_steps=3, guidance_scale=5.0, latents=latents
    ).images[0]  # fmt: skip
    difference = torch.tensor(list(ours.getdata()), dtype=torch.float32) - torch.tensor(list(picture.getdata()))
    assert difference.abs().mean() < 0.1


def test_a_ckpt_counts_on_from_its_source(tiny_file, tmp_path) -> None:
    save(open_model(tiny_file), tmp_path / "a.ckpt", "ckpt", progress=(2, 30))
    save(open_model(tmp_path / "a.ckpt"), tmp_path / "b.ckpt", "ckpt", progress=(1, 12))
    content = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 42)
    assert "model.diffusion_model.out.2.weight" in content["state_dict"]


def test_an_epoch_that_is_no_number_is_not_counted_on(tiny_file, tmp_path) -> None:
    save_file(load_file(tiny_file), tmp_path / "source.safetensors", {"epoch": "1/3", "global_step": "40"})
    save(open_model(tmp_path / "source.safetensors"), tmp_path / "m.ckpt", "ckpt", progress=(2, 2))
    content = torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (2, 42)


def test_a_model_can_be_saved_over_the_file_it_is_read_from(mixed_file) -> None:
    family = open_model(mixed_file)
    before = {name: tensor.clone() for name, tensor in load_file(mixed_file).items()}
    save(family, mixed_file, "safetensors", metadata={"modelspec.title": "t"})
    after = load_file(mixed_file)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with safe_open(mixed_file, "pt") as saved:
        assert saved.metadata()["modelspec.title"] == "t"


@pytest.mark.parametrize(
    ("layout", "write"), [("diffusers_safetensors", "save_safetensors"), ("diffusers", "save_pickle_checkpoint")]
)
def test_a_disk_that_is_full_leaves_the_folder_that_was_there(tiny_file, tmp_path, monkeypatch, layout, write) -> None:
    family = open_model(tiny_file)
    save(family, tmp_path / "folder", layout)
    before = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fill_the_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"library.models.sdxl.write_folder.{write}", fill_the_disk)
    with pytest.raises(UserError, match="the disk is full"):
        save(family, tmp_path / "folder", layout)
    assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_full_u_net_has_the_blocks_of_the_reference(family) -> None:
    reference = REFERENCE["unet_blocks_for_block_lr"]
    unet = build_unet(SdxlSizes().unet)
    blocks = family.denoiser_blocks(unet)
    names = {parameter: name for name, parameter in unet.named_parameters()}
    assert [len(block) for block in blocks] == reference["tensors_per_block"]
    assert [sum(parameter.numel() for parameter in block) for block in blocks] == reference["parameters_per_block"]
    assert [names[block[0]] for block in blocks] == reference["first_name_per_block"]
