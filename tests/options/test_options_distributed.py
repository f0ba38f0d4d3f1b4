"""What the launcher's wishes exclude, told before anything is loaded."""

import pytest

from library.options.errors import UsageError
from library.options.parse import parse
from library.options.scripts import SdxlTrainNetworkOptions, SdxlTrainOptions

BASE = "--pretrained_model_name_or_path owner/model --output_dir o --train_data_dir d"


def refusals(script: type, typed: str) -> list[str]:
    with pytest.raises(UsageError) as told:
        parse(script, f"{BASE} {typed}".split())
    return list(told.value.problems)


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--mixed_precision fp16", "excludes --mixed_precision fp16"),
        ("--mixed_precision bf16 --full_bf16", "excludes --full_bf16"),
        ("--optimizer_type AdamW8bit", "--optimizer_type AdamW8bit is not known to take right steps on shares"),
        ("--optimizer_type Prodigy", "Use one of AdamW, Adam, SGD"),
        ("--optimizer_type AdamWScheduleFree", "is not known to take right steps"),
        ("--ema_decay 0.999", "--ema_decay averages whole weights"),
        ("--fused_optimizer_groups 2", "before the 2 processes have exchanged its gradient"),
    ],
)
def test_a_divided_model_excludes_what_would_be_wrong(typed: str, words: str, divided: pytest.MonkeyPatch) -> None:
    assert words in " ".join(refusals(SdxlTrainOptions, typed))
    divided.setenv("WORLD_SIZE", "1")
    parse(SdxlTrainOptions, f"{BASE} {typed}".split())


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FSDP_VERSION", "1", "Set fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: true. Set it to false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "give --gradient_checkpointing"),
    ],
)
def test_settings_of_the_launcher_without_effect_are_refused(
    variable: str, value: str, words: str, divided: pytest.MonkeyPatch
) -> None:
    parse(SdxlTrainOptions, f"{BASE} --optimizer_type Lion".split())
    divided.setenv(variable, value)
    (told,) = refusals(SdxlTrainOptions, "")
    assert words in told


def test_networks_are_not_divided(divided: pytest.MonkeyPatch) -> None:
    (told,) = refusals(SdxlTrainNetworkOptions, "--network_module networks.lora")
    assert "only sdxl_train.py does" in told
