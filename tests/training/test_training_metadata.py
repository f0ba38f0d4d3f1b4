import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from library.options.errors import UserError
from library.options.groups.modelspec import ModelSpecOptions
from library.options.groups.network import NetworkOptions
from library.options.groups.noise import NoiseOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.record import option_values
from library.options.scripts import SdxlTrainNetworkOptions
from library.training.environment import source_revision
from library.training.metadata import (
    MINIMAL_KEYS,
    RECORDED_WHEN_SET,
    NetworkRecord,
    RunRecord,
    at_save,
    hash_sources,
    minimal,
    network_metadata,
    network_record,
    source_names,
)
from library.training.modelspec import ModelSpec, described_fields, model_title, thumbnail_data_url

REFERENCE = json.loads((Path(__file__).parents[1] / "compat" / "training_reference_values.json").read_text(encoding="utf-8"))
KEYS = REFERENCE["network_metadata_keys"]

RUN = RunRecord(
    session_id=1234,
    started_at=1700000000.5,
    seed=42,
    num_train_images=20,
    num_reg_images=4,
    num_validation_images=0,
    batches_per_epoch=10,
    num_epochs=3,
    total_updates=30,
    optimizer="torch.optim.adamw.AdamW(weight_decay=0.1)",
)
FAMILY = {"ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0"}
NETWORK = NetworkRecord(dim="8", alpha="4.0", args=None, text_encoder_lr="None")
FACTS = {"ss_datasets": [{"resolution": [1024, 1024]}], "ss_tag_frequency": {"1_cat": {"a cat": 2}}, "ss_dataset_dirs": {}}


def values(**groups: Any) -> dict[str, Any]:
    return option_values(SdxlTrainNetworkOptions(**groups))


def metadata(**groups: Any) -> dict[str, str]:
    return network_metadata(values(**groups), RUN, NETWORK, FACTS, FAMILY)


def test_every_key_that_is_always_there_is_written_and_no_other() -> None:
    written = at_save(metadata(), "my", steps=4, epochs_finished=0, now=1.0)
    assert set(written) == {*KEYS["always"], *KEYS["with_dataset_config"]}
    assert all(type(value) is str for value in written.values())


def test_options_are_written_as_given_and_unset_ones_as_none() -> None:
    written = metadata(optimizer=OptimizerOptions(learning_rate=1e-4), network=NetworkOptions(unet_lr=5e-5))
    assert written["ss_learning_rate"] == "0.0001"
    assert written["ss_unet_lr"] == "5e-05"
    assert written["ss_min_snr_gamma"] == "None"
    assert written["ss_full_fp16"] == "False"
    assert written["ss_lr_scheduler"] == "constant"
    assert written["ss_seed"] == "42"


def test_our_own_options_are_written_where_they_are_used() -> None:
    assert RECORDED_WHEN_SET.items() <= values().items()
    written = metadata(noise=NoiseOptions(timestep_distribution="logit_normal", logit_std=0.5))
    ours = {key: value for key, value in written.items() if key.removeprefix("ss_") in RECORDED_WHEN_SET}
    assert ours == {"ss_timestep_distribution": "logit_normal", "ss_logit_std": "0.5"}


def test_dataset_facts_are_json() -> None:
    assert json.loads(metadata()["ss_tag_frequency"]) == FACTS["ss_tag_frequency"]


def test_each_save_refreshes_step_epoch_and_time_and_leaves_the_rest() -> None:
    start = metadata()
    first, second = at_save(start, "a", 4, 0, 10.0), at_save(start, "b", 10, 1, 20.0)
    assert (first["ss_steps"], first["ss_epoch"]) == ("4", "0")
    assert (second["ss_steps"], second["ss_epoch"], second["ss_training_finished_at"]) == ("10", "1", "20.0")
    assert "ss_steps" not in start
    differing = {key for key in first if first[key] != second[key]}
    assert differing == {"ss_steps", "ss_epoch", "ss_training_finished_at", "ss_output_name"}


def test_a_file_without_an_output_name_is_offered_under_its_file_name() -> None:
    assert at_save(metadata(), "last", 1, 1, 1.0)["ss_output_name"] == "last"
    assert at_save({"ss_output_name": "my"}, "my-000001", 1, 1, 1.0)["ss_output_name"] == "my"


def test_no_metadata_keeps_what_user_interfaces_need() -> None:
    with_args = network_metadata(values(), RUN, NetworkRecord("8", "4.0", {"conv_dim": "4"}, "None"), FACTS, FAMILY)
    assert set(minimal(with_args)) == set(KEYS["minimum_with_no_metadata"]) == MINIMAL_KEYS
    assert minimal(with_args)["ss_base_model_version"] == "sdxl_base_v1-0"
    commented = metadata(network=NetworkOptions(training_comment="for the wall"))
    assert minimal(commented).items() - minimal(metadata()).items() == {("ss_training_comment", "for the wall")}


def lora(name: str, rank: int, alpha: float, kernel: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_down.weight": torch.zeros(rank, 16, *kernel), f"{name}.alpha": torch.tensor(alpha)}


def test_rank_and_alpha_are_those_in_use_whatever_was_asked_for() -> None:
    tensors = lora("a", 8, 2.0) | lora("b", 8, 2.0, (1, 1)) | lora("c", 4, 1.0, (3, 3))
    record = network_record(tensors, NetworkOptions(network_dim=64))
    assert (record.dim, record.alpha) == ("8", "2.0")


def test_mixed_ranks_are_called_dynamic() -> None:
    record = network_record(lora("a", 8, 2.0) | lora("b", 4, 2.0), NetworkOptions())
    assert (record.dim, record.alpha) == ("Dynamic", "2.0")


def test_other_kinds_of_network_are_described_by_their_options() -> None:
    record = network_record({"a.hada_w1_a": torch.zeros(4, 4)}, NetworkOptions(network_dim=6, network_alpha=3))
    assert (record.dim, record.alpha) == ("6", "3.0")


def test_network_arguments_are_split_at_the_first_equals_sign_and_carry_the_dropout() -> None:
    options = NetworkOptions(network_args=("conv_dim=4", "preset=a=b"), network_dropout=0.1)
    args = network_record({}, options).args
    assert args == {"dropout": 0.1, "conv_dim": "4", "preset": "a=b"}
    written = network_metadata(values(), RUN, network_record({}, options), {}, {})
    assert json.loads(written["ss_network_args"]) == args


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (NetworkOptions(), "None"),
        (NetworkOptions(text_encoder_lr=(1e-5,)), "1e-05"),
        (NetworkOptions(text_encoder_lr=(1e-5, 2e-5)), "[1e-05, 2e-05]"),
        (NetworkOptions(text_encoder_lr1=1e-5), "[1e-05, None]"),
    ],
)
def test_the_text_encoder_rate_is_one_value_where_it_is_one(options: NetworkOptions, expected: str) -> None:
    assert network_record({}, options).text_encoder_lr == expected


def test_source_files_are_named_without_their_folders(tmp_path: Path) -> None:
    assert source_names(str(tmp_path / "base.safetensors"), None) == {"ss_sd_model_name": "base.safetensors"}
    both = source_names("stabilityai/sdxl", str(tmp_path / "vae"))
    assert both == {"ss_sd_model_name": "sdxl", "ss_vae_name": "vae"}


def test_source_hashes_equal_those_of_sha256sum(tmp_path: Path) -> None:
    file = tmp_path / "base.safetensors"
    content = bytes(range(256)) * 0x1200
    file.write_bytes(content)
    (tmp_path / "window").write_bytes(content[0x100000 : 0x100000 + 0x10000])

    def sha256sum(path: Path) -> str:
        return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]

    assert hash_sources(str(file), str(tmp_path)).result() == {
        "ss_sd_model_hash": sha256sum(tmp_path / "window")[:8],
        "ss_new_sd_model_hash": sha256sum(file),
        "ss_vae_hash": "IsADirectory",
        "ss_new_vae_hash": "IsADirectory",
    }
    assert hash_sources("owner/name-on-a-hub", None).result() == {}


def spec(**changes: Any) -> dict[str, str]:
    given: dict[str, Any] = {
        "model": {"architecture": "stable-diffusion-xl-v1-base/lora", "implementation": "somewhere"},
        "title": "my",
        "resolution": (768, 1024),
        "prediction": "epsilon",
        "timestep_range": (None, None),
        "clip_skip": None,
        "fields": {},
    }
    return ModelSpec(**{**given, **changes}).at_save(now=1700000000.9)


def test_the_model_spec_has_the_keys_of_the_reference() -> None:
    written = spec()
    assert set(written) == set(KEYS["modelspec_seen_on_lora_save"])
    assert written["modelspec.sai_model_spec"] == "1.0.1"
    assert written["modelspec.resolution"] == "768x1024"
    assert written["modelspec.prediction_type"] == "epsilon"
    assert len(written["modelspec.date"]) == len("2023-11-14T22:13:20")


@pytest.mark.parametrize(
    ("bounds", "expected"), [((None, None), None), ((100, None), "100,1000"), ((None, 500), "0,500"), ((0, 900), "0,900")]
)
def test_the_timestep_range_is_written_when_either_bound_is_set(
    bounds: tuple[int | None, int | None], expected: str | None
) -> None:
    assert spec(timestep_range=bounds).get("modelspec.timestep_range") == expected


def test_velocity_prediction_and_clip_skip_are_told() -> None:
    written = spec(prediction="v", clip_skip=2)
    assert (written["modelspec.prediction_type"], written["modelspec.encoder_layer"]) == ("v", "2")


def test_every_metadata_option_reaches_the_file() -> None:
    names = [name for name in ModelSpecOptions.model_fields if name != "metadata_title"]
    options = ModelSpecOptions(**{name: f"data:{name}" for name in names})
    written = spec(fields=described_fields(options))
    for name in names:
        assert written[f"modelspec.{name.removeprefix('metadata_')}"] == f"data:{name}"


def test_the_title_is_as_given_else_the_output_name_else_the_kind_and_time() -> None:
    assert model_title(ModelSpecOptions(metadata_title="Cat"), "my", "LoRA", 5.0) == "Cat"
    assert model_title(ModelSpecOptions(), "my", "LoRA", 5.0) == "my"
    assert model_title(ModelSpecOptions(), None, "LoRA", 5.0) == "LoRA@5.0"


def test_a_thumbnail_file_becomes_a_data_url(tmp_path: Path) -> None:
    picture = tmp_path / "thumb.png"
    picture.write_bytes(b"\x89PNG...")
    url = thumbnail_data_url(str(picture))
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == picture.read_bytes()
    assert thumbnail_data_url(url) == url


@pytest.mark.parametrize("name", ["missing.png", "notes.txt"])
def test_a_thumbnail_that_is_no_picture_is_told_with_its_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=name):
        thumbnail_data_url(str(tmp_path / name))


def test_the_revision_of_the_suite_is_a_git_hash_or_unknown() -> None:
    revision = source_revision()
    assert revision == "(unknown)" or len(bytes.fromhex(revision)) == 20
