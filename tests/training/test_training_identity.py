"""A state is resumed by the run that saved it; what differs is named, and weighed."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from library.files.hashes import sampled_hash
from library.optim.own_settings import OwnSettings
from library.options.errors import UserError
from library.options.groups.loss import LossOptions
from library.options.groups.network import NetworkOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.output import OutputOptions
from library.options.groups.precision import PrecisionOptions
from library.options.groups.state import StateOptions
from library.options.record import options_of
from library.options.resuming import DECIDES, FREE, ROUNDS, compared_options, influence
from library.options.scripts import SdxlTrainNetworkOptions, SdxlTrainOptions
from library.training.identity import check_same_run, models_identity
from library.training.state import SavedPlace

DATA = {"dataset 1": {"resolution": [64, 64]}, "subset 1 (cats) of dataset 1": {"number of images": 3, "captions": "ab"}}


def identity(options: Any = None, **more: Any) -> dict[str, Any]:
    found = {"options": compared_options(options or SdxlTrainNetworkOptions()), "seed": 1, "models": {"--vae": None}}
    return {**found, "data": copy.deepcopy(DATA), "processes": 1, "updates": 10, **more}


def saved(identity: dict[str, Any] | None) -> SavedPlace:
    return SavedPlace(Path("net-state"), None, 1, 5, identity=identity)


def with_groups(**groups: Any) -> SdxlTrainNetworkOptions:
    return SdxlTrainNetworkOptions(**groups)


def refused(before: dict[str, Any], now: dict[str, Any], options: SdxlTrainNetworkOptions | None = None) -> list[str]:
    with pytest.raises(UserError) as told:
        check_same_run(saved(before), now, options or SdxlTrainNetworkOptions())
    first, *listed, last = str(told.value).splitlines()
    assert first == "--resume: this is not the run that saved net-state:" and "give --resume_changed" in last
    return [line.removeprefix("- ") for line in listed]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (with_groups(optimizer=OptimizerOptions(learning_rate=1e-3)), "--learning_rate was 2e-06 and is 0.001"),
        (with_groups(network=NetworkOptions(network_args=("a=1",))), "--network_args was not given and is a=1"),
        (with_groups(loss=LossOptions(min_snr_gamma=5)), "--min_snr_gamma was not given and is 5.0"),
        (with_groups(precision=PrecisionOptions(mixed_precision="bf16")), "--mixed_precision was no and is bf16"),
    ],
)
def test_an_option_that_decides_is_named(options: SdxlTrainNetworkOptions, words: str) -> None:
    assert refused(identity(), identity(options)) == [words]


def test_seed_model_and_data_that_changed_are_named_together() -> None:
    now = identity(seed=2, models={"--vae": "vae.safetensors (12ab)"})
    now["data"]["subset 1 (cats) of dataset 1"] |= {"number of images": 4, "captions": "ac"}
    now["data"]["subset 2 (dogs) of dataset 1"] = {}
    assert refused(identity(), now) == [
        "--seed was 1 and is 2",
        "--vae was not given and is vae.safetensors (12ab)",
        "number of images of subset 1 (cats) of dataset 1 was 3 and is 4",
        "subset 1 (cats) of dataset 1 has other captions",
        "subset 2 (dogs) of dataset 1 is new",
    ]


def test_with_resume_changed_it_is_said_and_done(caplog: pytest.LogCaptureFixture) -> None:
    options = SdxlTrainNetworkOptions(state=StateOptions(resume_changed=True))
    check_same_run(saved(identity()), identity(seed=2), options)
    assert "The run goes on with what changed since the state was saved:\n- --seed was 1 and is 2" in caplog.text


def test_what_only_rounds_and_the_length_are_said(caplog: pytest.LogCaptureFixture) -> None:
    options = with_groups(precision=PrecisionOptions(gradient_checkpointing=True), output=OutputOptions(output_name="other"))
    check_same_run(saved(identity()), identity(options, processes=2, updates=20), options)
    assert (
        "same numbers up to rounding: --gradient_checkpointing was False and is True; the number of processes was 1" in caplog.text
    )
    assert "The run ends at step 20 now; it would have ended at step 10" in caplog.text


def test_a_state_of_an_older_version_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    check_same_run(saved(None), identity(), SdxlTrainNetworkOptions())
    assert caplog.messages == ["net-state does not say which data and options it was saved with, so nothing of that is compared."]
    before = identity()
    del before["options"][DECIDES]["min_snr_gamma"]  # there was no such option yet
    check_same_run(saved(before), identity(), SdxlTrainNetworkOptions())
    assert refused(before, identity(with_groups(loss=LossOptions(min_snr_gamma=5)))) == ["--min_snr_gamma was not given and is 5.0"]


@pytest.mark.parametrize("script", [SdxlTrainOptions, SdxlTrainNetworkOptions])
def test_what_options_decide(script: type) -> None:
    kinds = {name: influence(name, option.attribute) for name, option in options_of(script).items()}
    free = {
        "output_dir",
        "resume",
        "max_train_steps",
        "logging_dir",
        "sample_prompts",
        "max_data_loader_n_workers",
        "dataset_config",
    }
    assert {kinds[name] for name in free} == {FREE}
    assert {kinds[name] for name in ("sdpa", "gradient_checkpointing", "torch_compile", "vae_batch_size")} == {ROUNDS}
    decide = (
        "learning_rate",
        "lr_scheduler",
        "noise_offset",
        "loss_type",
        "gradient_accumulation_steps",
        "cache_latents",
        "full_bf16",
    )
    assert {kinds[name] for name in decide} == {DECIDES}


def test_models_are_known_by_content_and_not_by_place(tmp_path: Path) -> None:
    def found(path: Path) -> str | None:
        options = SdxlTrainOptions()
        options = type(options)(model=options.model.model_copy(update={"pretrained_model_name_or_path": str(path)}))
        return models_identity(options)["--pretrained_model_name_or_path"]

    one, other = tmp_path / "model.safetensors", tmp_path / "elsewhere" / "model.safetensors"
    one.write_bytes(bytes(10_000_000))
    before = found(one)
    other.parent.mkdir()
    one.rename(other)
    assert found(other) == before and before is not None and before.startswith("model.safetensors (")
    with other.open("rb+") as file:
        file.seek(5_000_000)
        file.write(b"x")
    assert found(other) != before
    assert found(Path("owner/model")) == "owner/model"
    folder = sampled_hash(tmp_path)
    (tmp_path / "elsewhere" / "notes.txt").write_text("nothing of the model")
    assert sampled_hash(tmp_path) == folder
    (tmp_path / "more.bin").write_bytes(b"x")
    assert sampled_hash(tmp_path) != folder


def schedule_of(optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: max(0.0, 1 - k / total))


def steps(rate: float, decay: float, total: int, saved: tuple[dict, dict] | None = None) -> tuple[list[float], tuple[dict, dict]]:
    """Return the rates of two updates after those in the state, and the state then."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [parameter]}], lr=rate, weight_decay=decay)
    schedule = schedule_of(optimizer, total)
    if saved is not None:
        own = OwnSettings.of(optimizer, schedule)
        optimizer.load_state_dict(copy.deepcopy(saved[0]))
        schedule.load_state_dict(copy.deepcopy(saved[1]))
        own.put_back(optimizer, schedule)
        assert optimizer.param_groups[0]["weight_decay"] == decay
    rates = []
    for _ in range(2):
        rates.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.ones(2)
        optimizer.step()
        schedule.step()
    return rates, (optimizer.state_dict(), schedule.state_dict())


def test_the_rate_goes_on_as_the_options_say(caplog: pytest.LogCaptureFixture) -> None:
    first, state = steps(0.1, 0.01, total=10)
    assert first == pytest.approx([0.1, 0.09])
    same, _ = steps(0.1, 0.01, 10, state)
    assert same == pytest.approx([0.08, 0.07]) and not caplog.messages
    longer, _ = steps(0.1, 0.01, 20, state)
    assert longer == pytest.approx([0.09, 0.085])
    assert caplog.messages == ["The learning rate goes on at 0.09; in the state it was 0.08."]
    lower, _ = steps(0.01, 0.5, 10, state)
    assert lower == pytest.approx([0.008, 0.007])
