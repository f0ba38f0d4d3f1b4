"""SDXL behind the family interface: the whole way from text, images and sizes to a prediction, against diffusers' pipeline."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from library.models.family import Family, ModelSource, SizeConditioning
from library.models.sdxl.embeddings import size_embedding
from library.models.sdxl.family import SdxlFamily
from library.models.weights import content_hash
from library.options.groups.loss import LossOptions
from library.options.groups.model import ModelOptions
from library.options.groups.noise import NoiseOptions
from tests.models.saving import save_parts

CPU = torch.device("cpu")
REFERENCE = json.loads((Path(__file__).parents[1] / "compat" / "training_reference_values.json").read_text(encoding="utf-8"))
TEXTS = ["a photo of a cat", "", "score_9, hand-drawn!"]


@pytest.fixture(scope="module")
def encoders(family):
    return family.load_text_encoders(torch.float32, CPU)


def test_it_is_a_family(family) -> None:
    as_family: Family = family
    assert as_family.network_metadata() == {"ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0"}
    assert as_family.model_spec()["architecture"] == "stable-diffusion-xl-v1-base"


@pytest.mark.parametrize("said", ["v", "epsilon", None])
@pytest.mark.parametrize("is_v", [False, True], ids=["epsilon", "v"])
def test_the_objective_is_that_of_the_options_and_what_the_file_says_otherwise_is_told(family, caplog, said, is_v) -> None:
    metadata = {"modelspec.prediction_type": said} if said else {}
    opened: Family = replace(family, checkpoint=replace(family.checkpoint, metadata=metadata))
    noise = NoiseOptions(zero_terminal_snr=is_v, min_timestep=100)
    objective = opened.make_objective(ModelOptions(v_parameterization=is_v), noise, LossOptions(min_snr_gamma=5.0), CPU)
    assert (objective.prediction, objective.zero_terminal_snr) == (("v", True) if is_v else ("epsilon", False))
    assert objective.trained_timesteps == (100, 1000)
    assert "min-SNR weight, gamma 5.0" in objective.describe()
    told = {(False, "v"): "add --v_parameterization", (True, "epsilon"): "leave out --v_parameterization"}.get((is_v, said))
    assert (told in caplog.text) if told else not caplog.text


def test_text_caches_of_sd_scripts_are_trusted_for_folders_alone(family, tmp_path) -> None:
    assert not family.trusts_foreign_text_caches()
    assert replace(family, source=ModelSource(str(tmp_path))).trusts_foreign_text_caches()


def test_size_embeddings_equal_sd_scripts() -> None:
    expected = REFERENCE["size_embeddings"]
    sizes = SizeConditioning(*(torch.tensor([expected[name]]) for name in ("original_hw", "crop_top_left", "target_hw")))
    embedded = size_embedding(sizes, 256)
    assert list(embedded.shape) == expected["shape"]
    numbers = embedded.reshape(6, 2, 128)[:, :, :4]
    torch.testing.assert_close(numbers[:, 0], torch.tensor(expected["cos_part_first4_of_each_256"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(numbers[:, 1], torch.tensor(expected["sin_part_first4_of_each_256"]), rtol=1e-5, atol=1e-6)


def test_encoded_text_equals_diffusers(family, encoders, pipeline) -> None:
    with torch.no_grad():
        ours = family.encode_text(family.tokenize(TEXTS), encoders)
        context, _, pooled, _ = pipeline.encode_prompt(TEXTS, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(torch.cat([ours["hidden1"], ours["hidden2"]], dim=-1)[:2], context[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours["pool2"][:2], pooled[:2], rtol=1e-4, atol=1e-4)


def test_prediction_equals_diffusers(family, pipeline) -> None:
    draw = torch.Generator().manual_seed(0)
    noisy, timesteps = torch.randn(2, 4, 8, 12, generator=draw), torch.tensor([10, 900])
    cond = {
        "hidden1": torch.randn(2, 77, 64, generator=draw),
        "hidden2": torch.randn(2, 77, 128, generator=draw),
        "pool2": torch.randn(2, 128, generator=draw),
    }
    sizes = SizeConditioning(torch.tensor([[64, 96], [70, 99]]), torch.tensor([[0, 3], [5, 0]]), torch.tensor([[64, 96]] * 2))
    time_ids = torch.cat([sizes.original_hw, sizes.crop_top_left, sizes.target_hw], dim=1)
    context = torch.cat([cond["hidden1"], cond["hidden2"]], dim=-1)
    with torch.no_grad():
        ours = family.predict(family.load_denoiser(torch.float32, CPU), noisy, timesteps, cond, sizes)
        added = {"text_embeds": cond["pool2"], "time_ids": time_ids}
        expected = pipeline.unet(noisy, timesteps, context, added_cond_kwargs=added).sample
    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-5


def test_prediction_needs_sizes(family) -> None:
    with pytest.raises(ValueError, match="sizes"):
        family.predict(torch.nn.Identity(), torch.zeros(1), torch.zeros(1), {}, None)


def test_long_prompts_are_encoded_row_by_row_and_joined(family, encoders) -> None:
    long = SdxlFamily.open(type(family.source)(family.source.path, max_token_length=150))
    text = " ".join(["cat"] * 100)
    tokens = long.tokenize([text, "a dog"])
    assert tokens["ids1"].shape == (2, 2, 77)
    with torch.no_grad():
        cond = long.encode_text(tokens, encoders)
        first = family.encode_text(family.tokenize([text]), encoders)
    assert {name: tuple(t.shape) for name, t in cond.items()} == {
        "hidden1": (2, 152, 64),
        "hidden2": (2, 152, 128),
        "pool2": (2, 128),
    }
    torch.testing.assert_close(cond["pool2"][:1], first["pool2"])
    torch.testing.assert_close(cond["hidden2"][:1, :76], first["hidden2"][:, :76])


def test_an_encoder_that_is_not_loaded_gives_nothing(family, encoders) -> None:
    tokens = family.tokenize(["a cat"])
    assert family.encode_text(tokens, [encoders[0], None]).keys() == {"hidden1"}
    assert family.encode_text(tokens, [None, encoders[1]]).keys() == {"hidden2", "pool2"}


def test_gradients_flow_to_an_encoder_that_is_trained(family) -> None:
    trained, frozen = family.load_text_encoders(torch.float32, CPU)
    trained.requires_grad_(True)
    cond = family.encode_text(family.tokenize(["a cat"]), [trained, frozen])
    assert cond["hidden1"].requires_grad
    assert not cond["hidden2"].requires_grad


def test_checkpointing_is_switched_on_everywhere(family) -> None:
    unet, encoders = family.load_denoiser(torch.float32, CPU), family.load_text_encoders(torch.float32, CPU)
    family.enable_gradient_checkpointing(unet)
    family.enable_text_checkpointing(encoders)
    assert all(block.recompute for block in family.blocks(unet).values())
    assert all(encoder.is_gradient_checkpointing and encoder.training for encoder in encoders)


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float32, np.float32), (torch.float16, np.float16), (torch.bfloat16, np.float32)]
)
def test_text_outputs_survive_the_cache_file(family, dtype, stored) -> None:
    cond = {"hidden1": torch.randn(77, 64), "hidden2": torch.randn(77, 128), "pool2": torch.randn(128)}
    cond = {name: tensor.to(dtype) for name, tensor in cond.items()}
    arrays = family.text_cache.pack(cond)
    assert arrays.keys() == family.text_cache.required_keys == {"hidden_state1", "hidden_state2", "pool2"}
    assert {array.dtype for array in arrays.values()} == {np.dtype(stored)}
    for name, tensor in family.text_cache.unpack(arrays).items():
        assert torch.equal(tensor.to(dtype), cond[name])


def test_a_fingerprint_is_that_of_the_weights_not_of_the_file(family, tmp_path) -> None:
    path = tmp_path / "copy.safetensors"
    save_parts(family, path, load_components(family), metadata={"note": "another header"})
    copy = SdxlFamily.open(type(family.source)(str(path)))
    for part in ("vae", "text_encoders"):
        assert copy.fingerprint(part) == family.fingerprint(part)
    changed = load_components(family)
    changed.text_encoders[1].text_projection.weight.data[0, 0] += 0.5
    save_parts(family, path, changed)
    other = SdxlFamily.open(type(family.source)(str(path)))
    assert other.fingerprint("vae") == family.fingerprint("vae")
    assert other.fingerprint("text_encoders") != family.fingerprint("text_encoders")


def test_a_fingerprint_is_remembered_as_long_as_the_file_is_as_it_was(family, tmp_path, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(family.source.path, path)
    known, read = family.fingerprint("text_encoders"), []
    monkeypatch.setattr("library.models.sdxl.family.content_hash", lambda part: read.append(part) or content_hash(part))
    monkeypatch.setattr("library.files.remembered._WORTH", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def at(seconds: float, changes=None) -> tuple[str, int]:
        """The fingerprint of the file with this time, and how many parts were read for it."""
        os.utime(path, (seconds, seconds))
        read.clear()
        opened = SdxlFamily.open(ModelSource(str(path)))
        return (opened.with_changes(changes) if changes else opened).fingerprint("text_encoders"), len(read)

    assert [at(1e9), at(1e9), at(1.1e9)] == [(known, 2), (known, 0), (known, 2)]
    for place in (tmp_path / "cache" / "atelier" / "hashes").iterdir():
        place.write_text("damaged")
    assert [at(1e9), at(1e9)] == [(known, 2), (known, 0)]
    name, _ = next(iter(family.skeletons()["te1"].named_parameters()))
    found, count = at(1e9, {"te1": {name: lambda tensor: tensor + 1}})
    assert found != known and count == 1, "what is changed while it is read is not what the file is remembered for"
    now = time.time()
    assert [at(now)[1], at(now)[1]] == [2, 2], "a file that has just changed may change again within its time"
    monkeypatch.setattr("library.files.remembered._WORTH", path.stat().st_size + 1)
    assert [at(1.2e9)[1], at(1.2e9)[1]] == [2, 2], "what is read in no time is not worth remembering"


def load_components(family):
    from library.models.family import Components

    return Components(
        family.load_denoiser(torch.float32, CPU), family.load_vae(torch.float32, CPU), family.load_text_encoders(torch.float32, CPU)
    )
