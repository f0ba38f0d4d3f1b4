"""What is said about the Hugging Face hub before it is asked."""

import logging

import pytest

from library.options.errors import UsageError
from library.options.parse import parse
from library.options.scripts import SdxlTrainOptions

BASE = "--pretrained_model_name_or_path owner/model --train_data_dir d --output_dir o"
UPLOAD = "--huggingface_repo_id me/it"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (UPLOAD, "needs a token that may write there: log in once with `hf auth login`, set HF_TOKEN, or give --huggingface_token"),
        ("--huggingface_repo_id it --huggingface_token t", "it is not a repository on the hub. Repositories are called user/name"),
        ("--huggingface_repo_id me/.it --huggingface_token t", "me/.it is not a repository on the hub"),
        (
            f"{UPLOAD} --huggingface_token t --huggingface_repo_type modell",
            "--huggingface_repo_type modell is none of model, dataset",
        ),
        (f"{UPLOAD} --huggingface_token t --huggingface_repo_visibility pubic", "pubic is none of public, private"),
        ("--resume me/it/x", "--resume: there is no folder me/it/x"),
        ("--resume_from_huggingface", "--resume_from_huggingface needs --resume user/repo/path"),
        ("--resume me/it --resume_from_huggingface", "--resume me/it is not a folder on the hub"),
        ("--resume me/it/ --resume_from_huggingface", "it has the form user/repo/path or user/repo/path:revision:type"),
        ("--resume me/it/x:main:modell --resume_from_huggingface", "with one of the types model, dataset, space"),
        ("--resume m!/it/x --resume_from_huggingface", "m!/it is not a repository on the hub"),
    ],
)
def test_what_cannot_be_is_refused(line: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError) as told:
        parse(SdxlTrainOptions, [*BASE.split(), *line.split()])
    (problem,) = told.value.problems
    assert words in problem


@pytest.mark.parametrize("line", [f"{UPLOAD} --huggingface_token t", f"{UPLOAD} --huggingface_repo_type dataset"])
def test_a_token_of_a_login_is_as_good_as_one_given(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x" if "dataset" in line else None)
    parse(SdxlTrainOptions, [*BASE.split(), *line.split()])


def test_a_folder_on_this_machine_is_taken_before_one_on_the_hub(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").mkdir()
    parse(SdxlTrainOptions, [*BASE.split(), "--resume", str(tmp_path / "state"), "--resume_from_huggingface"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--async_upload --huggingface_path_in_repo x", "--huggingface_path_in_repo and --async_upload have no effect"),
        (
            f"{UPLOAD} --huggingface_token t --save_state_to_huggingface",
            "uploads no states: none are saved without --save_state",
        ),
        ("--log_with wandb --huggingface_token t", "wandb stores the command line, and --huggingface_token"),
    ],
)
def test_what_is_odd_is_said(line: str, words: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.options.checks.find_spec", lambda name: object())
    caplog.set_level(logging.WARNING)
    parse(SdxlTrainOptions, [*BASE.split(), *line.split()])
    assert words in caplog.text
