"""Single-file checkpoints: what is read, what is refused with which words, and what is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.models.family import Components, ModelSource
from library.models.sdxl.build import build_parts, part_tensors
from library.models.sdxl.family import SdxlFamily
from library.models.sdxl.open_model import part_shapes
from library.models.sdxl.single_file import single_file_tensors
from library.models.sdxl.sizes import SdxlSizes, TextEncoderSizes, VaeSizes
from library.options.errors import UserError
from tests.models.saving import save_parts

KEYS = json.loads((Path(__file__).parents[1] / "compat" / "sdxl_checkpoint_keys.json").read_text(encoding="utf-8"))["keys"]
CPU = torch.device("cpu")
LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"


def load(family: SdxlFamily, dtype: torch.dtype = torch.float32) -> Components:
    return Components(family.load_denoiser(dtype, CPU), family.load_vae(dtype, CPU), list(family.load_text_encoders(dtype, CPU)))


def open_file(path: Path, **more: object) -> SdxlFamily:
    return SdxlFamily.open(ModelSource(str(path), **more))


@pytest.fixture
def tensors(tiny_file: Path) -> dict[str, Tensor]:
    return load_file(tiny_file)


def test_a_full_size_file_would_have_every_name_and_shape_of_the_release() -> None:
    parts = {name: part_tensors(module) for name, module in build_parts(SdxlSizes()).items()}
    written = single_file_tensors(parts)
    assert {name: list(tensor.shape) for name, tensor in written.items()} == KEYS


def test_loading_and_saving_keeps_every_key_and_value(tiny_file, tensors, family, tmp_path) -> None:
    save_parts(family, tmp_path / "saved.safetensors", load(family))
    saved = load_file(tmp_path / "saved.safetensors")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(saved[name], tensor), name
    again = open_file(tmp_path / "saved.safetensors")
    save_parts(again, tmp_path / "again.safetensors", load(again))
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "saved.safetensors").read_bytes()


def test_every_part_has_the_dtype_asked_for_and_is_frozen(family) -> None:
    components = load(family, torch.bfloat16)
    for module in (components.denoiser, components.vae, *components.text_encoders):
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in module.parameters())
        assert not module.training
        assert {t.device for t in (*module.parameters(), *module.buffers())} == {CPU}


def test_weights_share_no_memory_with_the_file(tiny_file, tmp_path) -> None:
    path = shutil.copy(tiny_file, tmp_path / "model.safetensors")
    unet = open_file(path).load_denoiser(torch.float32, CPU)
    last = unet.time_embed[2].weight  # its bytes end the file
    before = last.clone()
    with Path(path).open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"\xff" * 1000)
    assert torch.equal(last, before)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_read_whole_gives_the_same_weights(tiny_file, family, mmap) -> None:
    ours = open_file(tiny_file, mmap=mmap).load_vae(torch.float32, CPU).state_dict()
    for name, tensor in family.load_vae(torch.float32, CPU).state_dict().items():
        assert torch.equal(ours[name], tensor)


@pytest.mark.parametrize(("suffix", "wrap"), [(".ckpt", True), (".ckpt", False), (".pt", True)])
def test_pickle_checkpoints_load(tensors, family, tmp_path, suffix, wrap) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save({"state_dict": tensors, "epoch": 3, "global_step": 7} if wrap else tensors, path)
    ours = open_file(path).load_denoiser(torch.float32, CPU).state_dict()
    for name, tensor in family.load_denoiser(torch.float32, CPU).state_dict().items():
        assert torch.equal(ours[name], tensor)


def test_diffusers_opens_what_is_saved(family, diffusers_configs, pipeline, tmp_path) -> None:
    from diffusers import StableDiffusionXLPipeline

    path = tmp_path / "saved.safetensors"
    save_parts(family, path, load(family))
    opened = StableDiffusionXLPipeline.from_single_file(str(path), config=str(diffusers_configs), local_files_only=True)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        expected = getattr(pipeline, part).state_dict()
        for name, tensor in getattr(opened, part).state_dict().items():
            assert torch.equal(tensor, expected[name]), f"{part} {name}"


def test_saving_in_another_dtype_casts_all_weights_and_leaves_the_model_alone(family, tmp_path) -> None:
    components = load(family)
    save_parts(family, tmp_path / "half.safetensors", components, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}
    assert components.denoiser.dtype == torch.float32


def test_a_text_encoder_that_was_freed_is_saved_from_the_source(tensors, family, tmp_path) -> None:
    components = load(family)
    components.text_encoders = [None, None]
    save_parts(family, tmp_path / "saved.safetensors", components)
    saved = load_file(tmp_path / "saved.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())


def test_optional_keys_are_kept_dropped_or_added_as_they_should_be(tensors, tmp_path) -> None:
    source = tensors | {
        LOGIT_SCALE: torch.tensor(1.25),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "denoiser.sigmas": torch.zeros(1000),
        "model_ema.decay": torch.zeros(()),
        "v_pred": torch.zeros(0),
        "ztsnr": torch.zeros(0),
    }
    save_file(source, tmp_path / "source.safetensors")
    family = open_file(tmp_path / "source.safetensors")
    assert family.declared_prediction() == "v"
    save_parts(family, tmp_path / "kept.safetensors", load(family), v_prediction=True, zero_terminal_snr=True)
    kept = load_file(tmp_path / "kept.safetensors")
    assert kept.keys() == tensors.keys() | {"v_pred", "ztsnr"}
    assert kept[LOGIT_SCALE] == 1.25
    save_parts(family, tmp_path / "epsilon.safetensors", load(family))
    assert load_file(tmp_path / "epsilon.safetensors").keys() == tensors.keys()
    save_file({name: t for name, t in tensors.items() if name != LOGIT_SCALE}, tmp_path / "without.safetensors")
    family = open_file(tmp_path / "without.safetensors")
    save_parts(family, tmp_path / "added.safetensors", load(family))
    assert abs(float(load_file(tmp_path / "added.safetensors")[LOGIT_SCALE]) - 4.6052) < 1e-6


def test_what_shapes_do_not_tell_is_read_from_metadata_and_kept(tensors, tmp_path) -> None:
    told = {"arch.unet.head_dim": "32", "arch.te1.heads": "2", "arch.te2.act": "quick_gelu", "arch.vae.scaling_factor": "0.2"}
    save_file(tensors, tmp_path / "told.safetensors", told | {"modelspec.prediction_type": "v", "other": "x"})
    family = open_file(tmp_path / "told.safetensors")
    assert family.sizes.unet.middle_block[1].head_dim == 32
    assert (family.sizes.te1.heads, family.sizes.te2.activation) == (2, "quick_gelu")
    torch.testing.assert_close(family.to_model_units(torch.ones(1)), torch.tensor([0.2]))
    assert family.declared_prediction() == "v"
    save_parts(family, tmp_path / "saved.safetensors", load(family), metadata={"modelspec.title": "t"})
    with safe_open(tmp_path / "saved.safetensors", "pt") as saved:
        assert saved.metadata() == told | {"format": "pt", "modelspec.title": "t"}


def test_the_alternative_spelling_of_the_projection_gives_the_same_model(tensors, family, tmp_path) -> None:
    name = "conditioner.embedders.1.model.text_projection"
    matrix = tensors.pop(name)
    save_file(tensors | {f"{name}.weight": matrix.T.contiguous()}, tmp_path / "other.safetensors")
    ours = open_file(tmp_path / "other.safetensors").load_text_encoders(torch.float32, CPU)[1]
    assert torch.equal(ours.text_projection.weight, family.load_text_encoders(torch.float32, CPU)[1].text_projection.weight)


def test_unknown_tensors_are_counted_once_and_ignored(tensors, tmp_path, caplog) -> None:
    extra = {"something.else": torch.zeros(1), "model.diffusion_model.extra.weight": torch.zeros(1)}
    save_file(tensors | extra, tmp_path / "more.safetensors")
    open_file(tmp_path / "more.safetensors")
    assert "1 tensors are no part of SDXL and are ignored (something.else)" in caplog.text
    assert "1 tensors of its U-Net are unknown and are ignored (extra.weight)" in caplog.text


STEM = "model.diffusion_model.input_blocks.0.0.weight"
FOREIGN = {
    "LoRA": {"lora_unet_x.lora_down.weight": (1,)},
    "ControlNet-LLLite": {"lllite_unet_x.conditioning1.0.weight": (1,)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": (1,)},
    "textual inversion": {"clip_l": (1, 768), "clip_g": (1, 1280)},
    "refiner": {"conditioner.embedders.0.model.ln_final.weight": (1,), STEM: (1, 4)},
    "inpainting": {STEM: (1, 9), "conditioner.embedders.1.model.ln_final.weight": (1,)},
    "EDM-type": {STEM: (1, 4), "edm_mean": (1,)},
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (1,)},
    "FLUX.1": {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (1,)},
    "Stable Diffusion 2": {STEM: (1, 4), "cond_stage_model.model.ln_final.weight": (1,)},
    "Stable Diffusion 1": {STEM: (1, 9), "cond_stage_model.transformer.text_model.final_layer_norm.bias": (1,)},
    "U-Net file of a diffusers folder": {"down_blocks.0.resnets.0.conv1.weight": (1,)},
    "a text encoder": {"text_model.final_layer_norm.bias": (1,)},
    "a VAE": {"encoder.conv_in.weight": (1,), "decoder.conv_in.weight": (1,)},
    "nothing in it is known": {"weights": (1,)},
    "no first text encoder and no second": {STEM: (1, 4)},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_another_kind_of_file_is_refused_by_its_name(what, tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in FOREIGN[what].items()}, path)
    with pytest.raises(UserError, match=what) as refused:
        open_file(path)
    assert str(path) in str(refused.value)


def test_a_missing_file_is_one_sentence(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_file(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [4, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused_before_anything_is_loaded(tiny_file, tmp_path, keep) -> None:
    data = tiny_file.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[: keep if keep >= 1 else int(len(data) * keep)])
    with pytest.raises(UserError, match=r"cut short|damaged"):
        open_file(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.diffusion_model.middle_block.1.proj_in.bias", None, r"U-Net .*middle_block\.1\.proj_in\.bias is missing"),
        ("model.diffusion_model.time_embed.0.weight", None, r"sizes cannot be read .*time_embed\.0\.weight"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", None, "first text encoder .*missing"),
        ("conditioner.embedders.1.model.ln_final.bias", (7,), r"second text encoder .*shape \[7\] instead of \[128\]"),
        ("first_stage_model.decoder.conv_out.bias", None, r"VAE .*decoder\.conv_out\.bias is missing"),
        ("model.diffusion_model.label_emb.0.0.weight", (256, 177), "not six size embeddings"),
    ],
)
def test_an_incomplete_file_is_refused_with_the_part_and_the_tensor(tensors, tmp_path, name, change, message) -> None:
    removed = tensors.pop(name)
    if change is not None:
        tensors[name] = removed.new_zeros(change)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=message):
        open_file(tmp_path / "bad.safetensors")


def test_encoders_of_another_model_are_refused(tensors, tmp_path) -> None:
    for name in list(tensors):
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            tensors[name] = torch.zeros(len(tensors[name]), 100)
    save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(UserError, match=r"context of width 100, but its text encoders give 64 \+ 128 = 192"):
        open_file(tmp_path / "mixed.safetensors")


def test_a_checkpoint_without_vae_needs_one_given(tensors, tiny_file, tmp_path) -> None:
    path = tmp_path / "without.safetensors"
    save_file({name: t for name, t in tensors.items() if not name.startswith("first_stage_model.")}, path)
    with pytest.raises(UserError, match="has no VAE"):
        open_file(path)
    open_file(path, vae=str(tiny_file)).load_vae(torch.float32, CPU)


@pytest.mark.parametrize(
    "sizes",
    [
        SdxlSizes(),
        SdxlSizes(
            te1=TextEncoderSizes(32, 2, 2, 96, 0, "quick_gelu"),
            te2=TextEncoderSizes(64, 3, 2, 128, 48, "gelu"),
            vae=VaeSizes((32, 32, 64), 1, 8),
        ),
    ],
    ids=["SDXL", "others"],
)
def test_the_shapes_that_files_are_checked_for_are_those_of_the_modules(sizes: SdxlSizes) -> None:
    modules = {name: part_tensors(module) for name, module in build_parts(sizes).items()}
    assert part_shapes(sizes) == {
        name: {key: tuple(tensor.shape) for key, tensor in part.items()} for name, part in modules.items()
    }
