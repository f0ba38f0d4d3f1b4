"""What leaves the machine: no secrets anywhere, no paths where other people read."""

import json
import logging
import re
from pathlib import Path

import pytest

from library.options.disclosure import command_without_secrets, loggable_config, options_without_secrets, tell_disclosures
from library.options.groups.hub import HubOptions
from library.options.groups.logging import LoggingOptions
from library.options.groups.network import NetworkOptions
from library.options.groups.state import StateOptions
from library.options.record import Kind, options_of
from library.options.scripts import SdxlTrainNetworkOptions, SdxlTrainOptions

REFERENCE = json.loads((Path(__file__).parents[1] / "compat" / "training_reference_values.json").read_text(encoding="utf-8"))
TRAINING = (SdxlTrainOptions, SdxlTrainNetworkOptions)
NO_PATHS = {
    "caption_extension", "caption_extention", "huggingface_path_in_repo", "log_prefix", "metadata_merged_from",
    "metadata_usage_hint", "output_name", "face_crop_aug_range", "huggingface_repo_type", "huggingface_repo_id",
}  # fmt: skip
"""Options that speak of files but name none of this machine."""


@pytest.mark.parametrize("script", TRAINING)
def test_every_option_that_names_a_file_or_folder_is_marked(script: type[SdxlTrainOptions]) -> None:
    for name, option in options_of(script).items():
        if option.kind in (Kind.TEXT, Kind.PATH) and not option.choices and name not in NO_PATHS:
            looks_so = re.search(r"\b(file|folder|checkpoint|model|vae)\b", f"{name} {option.summary}", re.IGNORECASE)
            assert option.is_path == bool(looks_so), name


def test_a_tracker_stores_neither_secrets_nor_paths_and_all_else() -> None:
    case = REFERENCE["log_config_filter"]
    leaks = {"in_json", "resume", "sample_prompts", "config_file", "log_tracker_config"}
    options = SdxlTrainNetworkOptions(
        network=NetworkOptions(
            network_dim=8, network_args=("conv_dim=4",), network_module="/home/me/mine.py", base_weights=("secret.safetensors",)
        ),
        logging=LoggingOptions(wandb_api_key="k" * 40, wandb_run_name="cats"),
        state=StateOptions(resume="my-state"),
    )
    stored = loggable_config(options)
    assert not ({*case["removed"], *leaks, "network_module", "base_weights"} & stored.keys())
    assert set(case["path_like_but_kept"]) - leaks <= stored.keys()
    assert (stored["network_dim"], stored["network_args"], stored["unet_lr"]) == (8, "('conv_dim=4',)", None)
    assert stored["wandb_run_name"] == "cats"
    assert "kkkk" not in json.dumps(stored)


@pytest.mark.parametrize("value", ["/data/x", "~/x", "C:\\x", "base=/data/x", "('a=1', 'b=D:/x')"])
def test_a_path_inside_another_text_is_left_out(value: str) -> None:
    assert "network_module" not in loggable_config(SdxlTrainNetworkOptions(network=NetworkOptions(network_module=value)))
    assert "network_module" in loggable_config(SdxlTrainNetworkOptions(network=NetworkOptions(network_module="a/b, and/or")))


def test_a_record_on_this_machine_has_every_option_but_no_secret() -> None:
    options = SdxlTrainNetworkOptions(logging=LoggingOptions(wandb_api_key="kkkk"), state=StateOptions(resume="my-state"))
    recorded = options_without_secrets(options)
    assert recorded.keys() == options_of(SdxlTrainNetworkOptions).keys()
    assert (recorded["wandb_api_key"], recorded["huggingface_token"], recorded["resume"]) == ("***", None, "my-state")


def test_a_command_line_is_shown_without_its_secrets() -> None:
    typed = ["--seed", "1", "--wandb_api_key", "kkk", "--huggingface_tok=ttt", "--wandb_api_key=kkk", "--wandb_run_name", "cats"]
    assert command_without_secrets(SdxlTrainNetworkOptions, typed) == [
        "--seed", "1", "--wandb_api_key", "***", "--huggingface_tok=***", "--wandb_api_key=***", "--wandb_run_name", "cats",
    ]  # fmt: skip


def test_what_wandb_shows_of_the_command_line_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    on_wandb = SdxlTrainNetworkOptions(logging=LoggingOptions(log_with="wandb", wandb_api_key="k"))
    typed = {"wandb_api_key": ("k",), "output_dir": ("/data/out",), "vae": ("vae.safetensors",), "config_file": ("run",)}
    tell_disclosures(on_wandb, typed | {"huggingface_repo_id": ("me/cats",)})
    warning, info = caplog.records
    assert warning.levelno == logging.WARNING
    assert "--wandb_api_key is on it" in warning.getMessage()
    assert info.getMessage().endswith(": --output_dir, --config_file, --huggingface_repo_id.")
    caplog.clear()
    tell_disclosures(on_wandb, {})  # as where a configuration file has the key
    tell_disclosures(SdxlTrainNetworkOptions(), typed)
    public = HubOptions(huggingface_repo_visibility="public")
    tell_disclosures(SdxlTrainNetworkOptions(logging=on_wandb.logging, hub=public), {"huggingface_repo_id": ("me/cats",)})
    assert not caplog.records
