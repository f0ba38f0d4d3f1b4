"""Diffusers folders as diffusers writes them, and a VAE of its own in every form."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.models.family import ModelSource
from library.models.sdxl.diffusers_folder import ldm_renamer
from library.models.sdxl.family import SdxlFamily
from library.models.sdxl.vae import vae_name
from library.options.errors import UserError

CPU = torch.device("cpu")
COMPAT = Path(__file__).parents[1] / "compat"


def open_folder(path: Path, **more: object) -> SdxlFamily:
    return SdxlFamily.open(ModelSource(str(path), **more))


def weights(family: SdxlFamily) -> dict[str, dict[str, Tensor]]:
    return {part: {name: e.read() for name, e in entries.items()} for part, entries in family.checkpoint.parts.items()}


def assert_same(ours: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]], tolerance: float = 0.0) -> None:
    for part, tensors in expected.items():
        assert ours[part].keys() == tensors.keys(), part
        for name, tensor in tensors.items():
            torch.testing.assert_close(ours[part][name].float(), tensor, rtol=tolerance, atol=tolerance, msg=f"{part} {name}")


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("folder")
    pipeline.save_pretrained(path)
    return path


def test_unet_names_convert_as_the_table_says() -> None:
    table = json.loads((COMPAT / "sdxl_unet_key_map.json").read_text(encoding="utf-8"))["map"]
    rename = ldm_renamer(dict.fromkeys(table.values()))
    assert {rename(theirs): theirs for theirs in table.values()} == table


def test_a_folder_gives_the_weights_of_the_single_file(folder, family) -> None:
    opened = open_folder(folder)
    assert opened.sizes == family.sizes
    assert_same(weights(opened), weights(family))


def test_a_folder_in_several_files_gives_the_same_weights(pipeline, family, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path, max_shard_size="10MB")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert_same(weights(open_folder(tmp_path)), weights(family))


def test_pickled_weights_give_the_same(pipeline, family, tmp_path) -> None:
    pipeline.vae.save_pretrained(tmp_path / "vae", safe_serialization=False)
    assert (tmp_path / "vae" / "diffusion_pytorch_model.bin").exists()
    ours = SdxlFamily.open(ModelSource(family.source.path, vae=str(tmp_path)))
    assert_same({"vae": weights(ours)["vae"]}, {"vae": weights(family)["vae"]})


@pytest.mark.parametrize("sharded", [False, True])
def test_the_fp16_variant_is_taken_when_it_is_preferred_or_alone(folder, family, tmp_path, sharded) -> None:
    both = shutil.copytree(folder, tmp_path / "both")
    for file in [*both.glob("unet/*.safetensors"), *both.glob("vae/*.safetensors"), *both.glob("text_encoder*/*.safetensors")]:
        half = {name: tensor.half() for name, tensor in load_file(file).items()}
        if sharded and file.parent.name == "unet":
            write_shards(file.parent, half)
        else:
            save_file(half, file.with_name(f"{file.stem}.fp16.safetensors"))
    assert {t.dtype for part in weights(open_folder(both)).values() for t in part.values()} == {torch.float32}
    preferred = weights(open_folder(both, prefer_fp16_variant=True))
    assert {t.dtype for part in preferred.values() for t in part.values()} == {torch.float16}
    assert_same(preferred, weights(family), tolerance=1e-3)
    own_vae = weights(open_folder(both, prefer_fp16_variant=True, keep_vae_precision=True))
    assert_same(own_vae, {"vae": weights(family)["vae"]})
    assert {tensor.dtype for tensor in own_vae["unet"].values()} == {torch.float16}
    replaced = SdxlFamily.open(ModelSource(str(both), vae=str(both / "vae"), prefer_fp16_variant=True, keep_vae_precision=True))
    assert_same(weights(replaced), {"vae": weights(family)["vae"]})
    for file in both.glob("*/*.safetensors"):
        if ".fp16" not in file.name:
            file.unlink()
    assert_same(weights(open_folder(both)), preferred_as_float(preferred))


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """The naming of a sharded variant."""
    names = sorted(tensors)
    files = [f"diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    for file, part in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in zip(files, halves, strict=True) for name in part}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(index, encoding="utf-8")


def preferred_as_float(parts: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {part: {name: tensor.float() for name, tensor in tensors.items()} for part, tensors in parts.items()}


@pytest.mark.parametrize("with_text_model", [True, False])
def test_both_spellings_of_text_encoder_names_are_read(folder, family, tmp_path, with_text_model) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    file = other / "text_encoder" / "model.safetensors"
    prefix = "text_model." if with_text_model else ""
    save_file({prefix + name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}, file)
    assert_same(weights(open_folder(other)), weights(family))


def test_a_folder_says_what_its_unet_predicts(folder, tmp_path) -> None:
    assert open_folder(folder).declared_prediction() is None
    other = shutil.copytree(folder, tmp_path / "other")
    scheduler = other / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text(encoding="utf-8"))
    scheduler.write_text(json.dumps(config | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}), encoding="utf-8")
    opened = open_folder(other)
    assert opened.declared_prediction() == "v"
    assert opened.checkpoint.markers == {"v_pred", "ztsnr"}


def test_another_pipeline_an_empty_folder_and_missing_weights_are_named(folder, tmp_path) -> None:
    with pytest.raises(UserError, match="not a diffusers model: it has no folder unet"):
        open_folder(tmp_path)
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights in its folder text_encoder_2"):
        open_folder(other)
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    with pytest.raises(UserError, match="not an SDXL base model but a FluxPipeline"):
        open_folder(other)


def test_a_lost_shard_is_named(pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path, max_shard_size="10MB")
    lost = sorted((tmp_path / "unet").glob("*-of-*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(UserError, match=lost.name):
        open_folder(tmp_path)


def test_a_name_that_is_no_path_is_looked_for_on_the_hub(folder, family, monkeypatch) -> None:
    asked: list[dict[str, object]] = []

    def snapshot_download(name: str, **options: object) -> str:
        asked.append({"name": name} | options)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same(weights(open_folder(Path("owner/model"))), weights(family))
    assert asked[0]["name"] == "owner/model"
    assert asked[0]["ignore_patterns"] == ["*.fp16*.safetensors"]


def test_a_name_the_hub_does_not_give_is_one_sentence(monkeypatch) -> None:
    def snapshot_download(name: str, **_: object) -> str:
        raise OSError("no connection\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"the Hugging Face hub does not give it: no connection$"):
        open_folder(Path("owner/model"))


VAE_FORMS = ("folder", "folder with vae", "diffusers names", "single-file names", "whole checkpoint", "ckpt")


@pytest.mark.parametrize("form", VAE_FORMS)
def test_a_vae_of_its_own_replaces_the_checkpoints(form, family, folder, tmp_path) -> None:
    vae = {name: tensor + 1 for name, tensor in weights(family)["vae"].items()}
    given = write_vae(form, vae, family, folder, tmp_path)
    ours = SdxlFamily.open(ModelSource(family.source.path, vae=str(given)))
    assert_same({"vae": weights(ours)["vae"]}, {"vae": vae})
    assert ours.fingerprint("vae") != family.fingerprint("vae")
    assert ours.fingerprint("text_encoders") == family.fingerprint("text_encoders")
    ours.load_vae(torch.float32, CPU)


def write_vae(form: str, vae: dict[str, Tensor], family: SdxlFamily, folder: Path, at: Path) -> Path:
    table = json.loads((COMPAT / "sdxl_vae_key_map.json").read_text(encoding="utf-8"))
    single = {
        old: vae[new] if old not in table["conv1x1_to_linear"] else vae[new][:, :, None, None]
        for old, new in table["map"].items()
        if new in vae
    }
    if form in ("folder", "folder with vae"):
        place = at if form == "folder" else at / "vae"
        place.mkdir(exist_ok=True)
        save_file(vae, place / "diffusion_pytorch_model.safetensors")
        return at
    if form == "ckpt":
        torch.save({"state_dict": single}, at / "vae.ckpt")
        return at / "vae.ckpt"
    whole = {f"first_stage_model.{name}": tensor for name, tensor in single.items()} | {"other": torch.zeros(1)}
    save_file({"diffusers names": vae, "single-file names": single, "whole checkpoint": whole}[form], at / "vae.safetensors")
    return at / "vae.safetensors"


def test_a_file_that_is_no_vae_is_refused(family, tmp_path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors is not a VAE"):
        SdxlFamily.open(ModelSource(family.source.path, vae=str(tmp_path / "x.safetensors")))
    with pytest.raises(UserError, match="There is no VAE in"):
        SdxlFamily.open(ModelSource(family.source.path, vae=str(tmp_path)))


def test_level_numbers_of_single_files_count_the_decoder_from_the_other_end() -> None:
    assert vae_name("decoder.up.0.block.1.conv1.weight", 3) == "decoder.up_blocks.2.resnets.1.conv1.weight"
    assert vae_name("encoder.down.0.block.1.conv1.weight", 3) == "encoder.down_blocks.0.resnets.1.conv1.weight"
