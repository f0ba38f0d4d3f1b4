"""What the launcher's wishes exclude, told before anything is loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest

from library.options.errors import UsageError
from library.options.groups.distributed import DistributedOptions
from library.options.parse import parse
from library.options.scripts import (
    CacheLatentsOptions,
    SdxlTrainControlNetLLLiteOptions,
    SdxlTrainControlNetOptions,
    SdxlTrainNetworkOptions,
    SdxlTrainOptions,
    SdxlTrainTextualInversionOptions,
)
from tests.cli.training_commands import environment_launched

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
        ("--optimizer_type AdamW8bit", "--optimizer_type AdamW8bit is not known to be right on those"),
        ("--optimizer_type Prodigy", "Use one of AdamW, Adam, SGD"),
        ("--optimizer_type AdamWScheduleFree", "is not known to be right"),
        ("--ema_decay 0.999", "--ema_decay averages whole weights"),
        ("--torch_compile", "--torch_compile has not been tried"),
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


@pytest.fixture
def zero(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("library.options.checks_distributed.find_spec", lambda name: object())
    monkeypatch.setenv("WORLD_SIZE", "2")
    return monkeypatch


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--zero_stage 0 --offload_optimizer_device cpu", "stage 0 divides nothing"),
        ("--offload_optimizer_device nvme", "--offload_optimizer_device nvme: with --zero_stage 2 DeepSpeed keeps it"),
        ("--offload_param_device cpu", "--offload_param_device needs --zero_stage 3"),
        ("--offload_param_nvme_path p", "is for --offload_param_device nvme"),
        ("--offload_optimizer_nvme_path p", "--offload_optimizer_nvme_path: with --zero_stage 2 DeepSpeed keeps it"),
        ("--fp16_master_weights_and_gradients", "--optimizer_type steps them"),
        ("--mixed_precision bf16 --full_bf16", "--deepspeed excludes --full_bf16"),
        ("--torch_compile", "has not been tried with --torch_compile"),
        ("--log_grad_norm", "--log_grad_norm measures whole gradients"),
        ("--mixed_precision fp16", "--deepspeed excludes --mixed_precision fp16"),
        ("--optimizer_type Adafactor", "--optimizer_type Adafactor is not known to be right"),
        ("--optimizer_type Adagrad", "Use one of AdamW, Adam, SGD, NAdam"),
    ],
)
def test_deepspeed_refuses_what_it_does_not_do_here(typed: str, words: str, zero: pytest.MonkeyPatch) -> None:
    for script, more in ((SdxlTrainOptions, ""), (SdxlTrainNetworkOptions, " --network_module networks.lora")):
        parse(script, f"{BASE} --deepspeed --offload_optimizer_device cpu{more}".split())
        (told,) = refusals(script, f"--deepspeed {typed}{more}")
        assert words in told


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--offload_optimizer_device nvme", "with --zero_stage 3 states of a run could not be saved"),
        ("--offload_param_device nvme", "needs --offload_param_nvme_path"),
        ("--offload_param_device cpu --offload_param_nvme_path p", "is for --offload_param_device nvme"),
        ("--gradient_checkpointing --cpu_offload_checkpointing", "would be taken for activations"),
    ],
)
def test_divided_weights_exclude_what_deepspeed_cannot_do_with_them(typed: str, words: str, zero: pytest.MonkeyPatch) -> None:
    alone = "--deepspeed --zero_stage 3"
    for good in ("", "--offload_param_device cpu", "--offload_param_device nvme --offload_param_nvme_path p"):
        parse(SdxlTrainOptions, f"{BASE} {alone} --gradient_checkpointing {good}".split())
    (told,) = refusals(SdxlTrainOptions, f"{alone} {typed}")
    assert words in told


@pytest.mark.parametrize(
    ("script", "more"),
    [
        (SdxlTrainNetworkOptions, "--network_module networks.lora"),
        (SdxlTrainTextualInversionOptions, "--token_string word"),
        (SdxlTrainControlNetOptions, ""),
        (SdxlTrainControlNetLLLiteOptions, "--cond_emb_dim 32 --network_dim 64"),
    ],
)
def test_only_whole_models_have_their_weights_divided(script: type, more: str, zero: pytest.MonkeyPatch) -> None:
    told = " ".join(refusals(script, f"--deepspeed --zero_stage 3 {more}"))
    assert "which only sdxl_train.py can" in told and "Give --zero_stage 2" in told


@pytest.fixture
def launched(zero: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Set the environment in which `accelerate launch` starts a script, given the lines of deepspeed_config."""

    def launch(lines: str) -> None:
        config = "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 2\n"
        written = tmp_path / "accelerate.yaml"
        written.write_text(config + "deepspeed_config:\n" + "".join(f"  {line}\n" for line in lines.split("; ")))
        for name, value in environment_launched(written).items():
            zero.setenv(name, value)

    return launch


def test_accelerates_configuration_of_deepspeed_does_what_the_options_do(launched: Callable[[str], None]) -> None:
    flags = "--deepspeed --zero_stage 3 --offload_param_device cpu --gradient_accumulation_steps 4 --max_grad_norm 0.5"
    typed = parse(SdxlTrainOptions, f"{BASE} {flags} --zero3_init_flag".split())
    launched(
        "zero_stage: 3; offload_optimizer_device: none; offload_param_device: cpu; gradient_accumulation_steps: 4; "
        "gradient_clipping: 0.5; zero3_init_flag: true; zero3_save_16bit_model: false"
    )
    ours = parse(SdxlTrainOptions, BASE.split())
    assert ours == typed
    assert (ours.distributed.deepspeed, ours.distributed.zero_stage, ours.distributed.offload_optimizer_device) == (True, 3, None)
    assert "excludes --full_bf16" in refusals(SdxlTrainOptions, "--mixed_precision bf16 --full_bf16")[0]
    parse(CacheLatentsOptions, BASE.split())


def test_what_was_typed_wins_over_accelerates_configuration_which_is_told(
    launched: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    launched("zero_stage: 1; gradient_accumulation_steps: auto; gradient_clipping: 1.0")
    assert parse(SdxlTrainOptions, f"{BASE} --max_grad_norm 0.1 --zero_stage 1".split()).optimizer.max_grad_norm == 0.1
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == "gradient_clipping in accelerate's configuration is 1.0, and --max_grad_norm 0.1 wins."


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("deepspeed_config_file: ds.json", "deepspeed_config_file in accelerate's configuration is not followed"),
        ("zero_stage: 2; deepspeed_moe_layer_cls_names: Layer", "no mixture of experts"),
        ("zero_stage: 7", "zero_stage in accelerate's configuration: '7'"),
        ("zero_stage: 2; offload_param_device: cpu", "--offload_param_device needs --zero_stage 3"),
    ],
)
def test_what_of_accelerates_configuration_cannot_be_followed_is_refused(
    lines: str, words: str, launched: Callable[[str], None]
) -> None:
    launched(lines)
    (told,) = refusals(SdxlTrainOptions, "")
    assert words in told


def test_deepspeed_needs_its_package_and_several_processes(zero: pytest.MonkeyPatch) -> None:
    zero.setenv("WORLD_SIZE", "1")
    assert "Launch at least two" in refusals(SdxlTrainOptions, "--deepspeed")[0]
    zero.setattr("library.options.checks_distributed.find_spec", lambda name: None)
    assert "pip install deepspeed" in refusals(SdxlTrainOptions, "--deepspeed")[0]


def test_options_without_effect_are_told(zero: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    parse(SdxlTrainOptions, f"{BASE} --zero_stage 1".split())
    parse(SdxlTrainOptions, f"{BASE} --deepspeed --ddp_static_graph".split())
    parse(SdxlTrainOptions, f"{BASE} --deepspeed --zero3_init_flag --zero3_save_16bit_model".split())
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(" has")[0] for line in told] == [
        "--zero_stage",
        "--ddp_static_graph",
        "--zero3_init_flag",
        "--zero3_save_16bit_model",
    ]
    assert "memory-mapped" in told[2] and "--save_precision" in told[3]


def test_stage_and_place_reach_deepspeed() -> None:
    from library.training.zero import zero_config

    asked = zero_config(DistributedOptions(deepspeed=True, zero_stage=1, offload_optimizer_device="cpu"), 0.5, 4, 2)
    assert asked["zero_optimization"] == {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    assert (asked["gradient_clipping"], asked["train_batch_size"]) == (0.5, 8)
    assert zero_config(DistributedOptions(deepspeed=True, zero_stage=0), 0.0, 1, 2)["zero_optimization"] == {"stage": 0}
    assert zero_config(DistributedOptions(deepspeed=True), 0.0, 1, 2)["zero_optimization"] == {"stage": 2}
    asked = zero_config(
        DistributedOptions(deepspeed=True, zero_stage=3, offload_param_device="nvme", offload_param_nvme_path="/p"), 0.0, 1, 2
    )
    assert asked["zero_optimization"]["offload_param"] == {"device": "nvme", "nvme_path": "/p"}
