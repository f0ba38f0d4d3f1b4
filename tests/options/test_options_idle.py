"""An option that does nothing without another one is told when it is given alone, and not when it has its effect."""

from pathlib import Path

import pytest

from library.options.parse import parse
from library.options.scripts import SdxlTrainNetworkOptions, SdxlTrainOptions

BASE = "--pretrained_model_name_or_path owner/model --output_dir o --train_data_dir d"
LORA = f"{BASE} --network_module networks.lora"
IDLE = [
    ("--save_last_n_epochs 2", "without --save_every_n_epochs", "--save_every_n_epochs 1"),
    ("--save_last_n_epochs 2", "without --save_every_n_epochs", "--save_n_epoch_ratio 3"),
    ("--save_last_n_steps 20", "without --save_every_n_steps", "--save_every_n_steps 10"),
    ("--save_last_n_epochs_state 2 --save_every_n_epochs 1", "without --save_state and", "--save_state"),
    ("--save_last_n_steps_state 2 --save_state", "and --save_every_n_steps", "--save_every_n_steps 1"),
    ("--resume_changed", "without --resume", "--resume ."),
    ("--sample_prompts {file}", "without --sample_every_n_epochs", "--sample_at_first"),
    ("--sample_sampler euler", "or --sample_at_first", "--sample_every_n_steps 5 --sample_prompts {file}"),
    ("--log_prefix x", "without --logging_dir", "--logging_dir logs"),
    ("--log_tracker_name x", "without --logging_dir or --log_with", "--logging_dir logs"),
    ("--log_tracker_config {file}", "without --logging_dir or --log_with", "--log_with wandb"),
    ("--log_config", "without --logging_dir or --log_with", "--log_with wandb"),
    ("--log_grad_norm", "or --log_events", "--log_events events.jsonl"),
    ("--wandb_run_name x --logging_dir logs", "without --log_with wandb", "--log_with wandb"),
    ("--highvram", "without --cache_latents", "--cache_latents"),
    ("--text_cache_variants 3", "without --cache_text_encoder_outputs", "--cache_text_encoder_outputs"),
    ("--skip_cache_check --cache_latents", "without --cache_latents_to_disk or", "--cache_latents_to_disk"),
    ("--skip_cache_check --cache_latents", "or --cache_text_encoder", "--cache_text_encoder_outputs_to_disk"),
    ("--lr_scheduler_num_cycles 2", "with --lr_scheduler constant", "--lr_scheduler cosine_with_restarts"),
    (
        "--lr_scheduler_power 2 --lr_scheduler linear",
        "with --lr_scheduler linear; it is for polynomial",
        "--lr_scheduler polynomial",
    ),
    ("--lr_scheduler_timescale 9", "it is for inverse_sqrt", "--lr_scheduler inverse_sqrt"),
    ("--lr_scheduler_min_lr_ratio 0.1", "cosine_with_min_lr, warmup_stable_decay", "--lr_scheduler cosine_with_min_lr"),
    ("--lr_decay_steps 10%", "it is for warmup_stable_decay", "--lr_scheduler warmup_stable_decay"),
]
REPLACED = [
    ("--save_every_n_epochs 1 --save_n_epoch_ratio 2", "--save_every_n_epochs has no effect beside --save_n_epoch_ratio"),
    (
        "--sample_every_n_steps 1 --sample_every_n_epochs 1 --sample_prompts {file}",
        "--sample_every_n_steps has no effect beside --sample_every_n_epochs",
    ),
    ("--max_train_steps 5 --max_train_epochs 2", "--max_train_steps has no effect beside --max_train_epochs"),
    ("--lr_scheduler cosine --lr_scheduler_type ConstantLR", "--lr_scheduler has no effect beside --lr_scheduler_type"),
    ("--lr_scheduler_power 2 --lr_scheduler_type ConstantLR", "--lr_scheduler_power has no effect beside --lr_scheduler_type"),
]


@pytest.fixture(autouse=True)
def wandb_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.options.checks.find_spec", lambda name: object())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.txt"
    path.write_text("a cat")
    return path


@pytest.mark.parametrize(("typed", "words", "needed"), IDLE)
def test_an_option_that_needs_another_is_told_alone_and_not_beside_it(
    typed: str, words: str, needed: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parse(SdxlTrainNetworkOptions, f"{LORA} {typed}".format(file=file).split())
    (told,) = caplog.messages
    assert told.startswith(f"{typed.split()[0]} has no effect ") and words in told
    caplog.clear()
    parse(SdxlTrainNetworkOptions, f"{LORA} {typed} {needed}".format(file=file).split())
    assert caplog.messages == []


@pytest.mark.parametrize(("typed", "words"), REPLACED)
def test_an_option_that_another_replaces_is_told(typed: str, words: str, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    parse(SdxlTrainOptions, f"{BASE} {typed}".format(file=file).split())
    (told,) = caplog.messages
    assert told.startswith(words)
