import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from library.options.errors import UserError
from library.options.groups.output import ModelOutputOptions, OutputOptions
from library.options.groups.state import StateOptions
from library.training.outputs import (
    RunLength,
    SavePlan,
    checkpoint_name,
    epoch_interval,
    output_problems,
    remove_outputs,
    state_name,
)

REFERENCE = json.loads((Path(__file__).parents[1] / "compat" / "training_reference_values.json").read_text(encoding="utf-8"))


def plan(folder: Path, num_epochs: int = 3, state: StateOptions | None = None, **output: Any) -> SavePlan:
    output_options = OutputOptions(output_dir=str(folder), **{"output_name": "my", **output})
    return SavePlan.of(output_options, state or StateOptions(), ".safetensors", num_epochs)


@pytest.mark.parametrize(
    ("expected", "name"),
    [
        ("epoch_1", checkpoint_name("epoch", 1, "my", ".safetensors")),
        ("epoch_123456", checkpoint_name("epoch", 123456, "my", ".safetensors")),
        ("step_1", checkpoint_name("step", 1, "my", ".safetensors")),
        ("step_12345", checkpoint_name("step", 12345, "my", ".ckpt")),
        ("last", checkpoint_name("final", 7, "my", ".safetensors")),
        ("diffusers_epoch_1", checkpoint_name("epoch", 1, "my", "")),
        ("diffusers_step_1", checkpoint_name("step", 1, "my", "")),
        ("state_epoch_1", state_name("epoch", 1, "my")),
        ("state_step_100", state_name("step", 100, "my")),
        ("state_last", state_name("final", 7, "my")),
    ],
)
def test_files_and_states_have_the_names_front_ends_look_for(expected: str, name: str) -> None:
    assert name == REFERENCE["checkpoint_names"][expected]


def test_without_an_output_name_files_are_called_epoch_at_and_last() -> None:
    models, states = (REFERENCE["checkpoint_names"][key] for key in ("no_output_name", "default_state_names_without_output_name"))
    assert checkpoint_name("epoch", 1, None, ".pt") == models["epoch_1"]
    assert checkpoint_name("step", 1, None, ".pt") == models["step_1"]
    assert checkpoint_name("final", 1, None, ".pt") == models["last"]
    assert state_name("epoch", 1, None) == states["epoch_1"]
    assert state_name("step", 100, None) == states["step_100"]
    assert state_name("final", 1, None) == states["last"]


@pytest.mark.parametrize("case", REFERENCE["accounting"])
def test_updates_epochs_and_the_epoch_interval_equal_the_reference(case: dict[str, Any]) -> None:
    of_one_process = -(-case["batches"] // case["num_processes"])
    max_train_steps = 1 if case["max_train_epochs"] else case["max_train_steps"]
    length = RunLength.of(of_one_process, case["grad_accum"], max_train_steps, case["max_train_epochs"])
    assert (length.total_updates, length.updates_per_epoch, length.num_epochs) == (
        case["max_train_steps"],
        case["updates_per_epoch"],
        case["num_train_epochs"],
    )
    assert epoch_interval(None, case["save_n_epoch_ratio"], length.num_epochs) == case["save_every_n_epochs"]


def test_finished_epochs_count_whole_epochs_and_the_last_one_when_the_run_is_over() -> None:
    length = RunLength.of(batches_per_epoch=10, accumulation=1, max_train_steps=25, max_train_epochs=None)
    recorded = REFERENCE["network_metadata_epoch_and_step"]
    assert str(length.epochs_finished(4)) == recorded["step 4 in first epoch"]["ss_epoch"]
    assert str(length.epochs_finished(10)) == recorded["after epoch 1 (10 updates)"]["ss_epoch"]
    assert str(length.epochs_finished(25)) == recorded["end of 3 epochs"]["ss_epoch"]


def run_epochs(saving: SavePlan, total: int) -> list[int]:
    """Save and remove files as a run of `total` epochs does, and return the epochs that are left."""
    saving.folder.mkdir(exist_ok=True)
    for epoch in range(1, total + 1):
        if saving.should_save_epoch(epoch):
            saving.model_path("epoch", epoch).touch()
            remove_outputs([saving.outdated_model("epoch", epoch)], saving.folder)
    return sorted(int(path.stem[-6:]) for path in saving.folder.iterdir())


@pytest.mark.parametrize("name", REFERENCE["retention"]["epochs"])
def test_a_run_leaves_the_epoch_files_of_the_reference(name: str, tmp_path: Path) -> None:
    every, last, total = (part.removeprefix(word) for part, word in zip(name.split("_"), ("every", "last", "total"), strict=True))
    keep = None if last == "None" else int(last)
    saving = plan(tmp_path / "out", int(total), save_every_n_epochs=int(every), save_last_n_epochs=keep)
    assert run_epochs(saving, int(total)) == REFERENCE["retention"]["epochs"][name]


@pytest.mark.parametrize("name", REFERENCE["retention"]["steps"])
def test_a_run_leaves_the_step_files_of_the_reference(name: str, tmp_path: Path) -> None:
    every, last = (int(part.removeprefix(word)) for part, word in zip(name.split("_"), ("every", "last"), strict=True))
    saving = plan(tmp_path, save_every_n_steps=every, save_last_n_steps=last)
    for step, expected in REFERENCE["retention"]["steps"][name].items():
        assert saving.should_save_step(int(step))
        saving.model_path("step", int(step)).touch()
        old = saving.outdated_model("step", int(step))
        assert old == (None if expected["remove"] is None else saving.model_path("step", expected["remove"]))
        remove_outputs([old], tmp_path)
        assert sorted(int(path.stem[-8:]) for path in tmp_path.iterdir()) == expected["kept"]


def test_only_multiples_of_the_interval_are_saved_and_the_last_epoch_is_left_to_the_final_save(tmp_path: Path) -> None:
    saving = plan(tmp_path, num_epochs=6, save_every_n_epochs=2, save_every_n_steps=5)
    assert [epoch for epoch in range(1, 7) if saving.should_save_epoch(epoch)] == [2, 4]
    assert [step for step in range(11) if saving.should_save_step(step)] == [5, 10]


def test_nothing_but_the_final_model_is_saved_unless_asked_for(tmp_path: Path) -> None:
    saving = plan(tmp_path)
    assert not any(saving.should_save_epoch(number) or saving.should_save_step(number) for number in range(1, 100))


def test_states_are_kept_as_long_as_models_unless_they_have_a_limit_of_their_own(tmp_path: Path) -> None:
    intervals = {"save_every_n_epochs": 1, "save_every_n_steps": 10, "save_last_n_epochs": 3, "save_last_n_steps": 30}
    same = plan(tmp_path, **intervals)
    assert same.outdated_state("epoch", 5) == tmp_path / "my-000002-state"
    assert same.outdated_state("step", 50) == tmp_path / "my-step00000010-state"
    own = plan(tmp_path, **intervals, save_last_n_epochs_state=1, save_last_n_steps_state=10)
    assert own.outdated_state("epoch", 5) == tmp_path / "my-000004-state"
    assert own.outdated_state("step", 50) == tmp_path / "my-step00000030-state"
    assert own.outdated_model("epoch", 5) == tmp_path / "my-000002.safetensors"


@pytest.mark.parametrize(
    ("state", "along", "at_end"),
    [
        (StateOptions(), False, False),
        (StateOptions(save_state=True), True, True),
        (StateOptions(save_state_on_train_end=True), False, True),
    ],
)
def test_states_go_with_every_save_or_with_the_last_one(state: StateOptions, along: bool, at_end: bool, tmp_path: Path) -> None:
    saving = plan(tmp_path, state=state)
    assert (saving.should_save_state("step"), saving.should_save_state("epoch")) == (along, along)
    assert saving.should_save_state("final") is at_end


def test_removing_takes_files_and_folders_and_does_not_mind_what_is_gone(tmp_path: Path) -> None:
    state = tmp_path / "my-000001-state"
    state.mkdir()
    (state / "optimizer.bin").touch()
    model = tmp_path / "my-000001.safetensors"
    model.touch()
    kept = tmp_path / "my.safetensors"
    kept.touch()
    remove_outputs([state, model, tmp_path / "never-there", None], tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_removing_a_link_to_a_folder_leaves_the_folder(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "my-000001-state").symlink_to(elsewhere)
    remove_outputs([folder / "my-000001-state"], folder)
    assert not list(folder.iterdir())
    assert (elsewhere / "precious").exists()


def test_nothing_outside_the_output_folder_is_ever_removed(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.touch()
    with pytest.raises(ValueError, match="not directly inside"):
        remove_outputs([outside], tmp_path / "out")
    assert outside.exists()


def test_a_missing_output_folder_option_is_told_before_anything_is_loaded() -> None:
    assert output_problems(OutputOptions()) == ["--output_dir is missing: give the folder that the trained files are written to."]
    with pytest.raises(UserError, match="--output_dir"):
        SavePlan.of(OutputOptions(), StateOptions(), ".safetensors", 1)


@pytest.mark.parametrize("name", ["sub/my", "/tmp/my", "..", "my/"])
def test_an_output_name_with_folders_in_it_is_refused(name: str, tmp_path: Path) -> None:
    (problem,) = output_problems(OutputOptions(output_dir=str(tmp_path), output_name=name))
    assert repr(name) in problem


def test_an_output_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (problem,) = output_problems(OutputOptions(output_dir=str(tmp_path / "file" / "out")))
    assert "is a file" in problem
    assert output_problems(OutputOptions(output_dir=str(tmp_path / "new" / "out"), output_name="my.v2")) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system in which nobody can make files")
@pytest.mark.parametrize("folder", ["/proc", "/proc/nope", "/proc/nope/deep"])
def test_an_output_folder_that_cannot_be_made_is_refused_whatever_the_rights_say(folder: str) -> None:
    (problem,) = output_problems(OutputOptions(output_dir=folder))
    assert problem.startswith(f"--output_dir {folder} cannot be written to. /proc could not be written: ")


def test_asking_whether_an_output_folder_can_be_made_leaves_nothing(tmp_path: Path) -> None:
    assert output_problems(OutputOptions(output_dir=str(tmp_path / "new"))) == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_or_file_of_something_else_in_the_place_of_a_model_is_refused(tmp_path: Path) -> None:
    folders = ModelOutputOptions(output_dir=str(tmp_path), output_name="dog", save_model_as="diffusers")
    (tmp_path / "dog").mkdir()
    assert output_problems(folders) == []
    (tmp_path / "dog" / "photo.jpg").touch()
    (told,) = output_problems(folders)
    assert str(tmp_path / "dog") in told and "model_index.json" in told and "--output_name" in told
    (tmp_path / "dog" / "model_index.json").touch()
    (tmp_path / "dog-000002").touch()
    (tmp_path / "dog-notes").touch()
    (told,) = output_problems(folders)
    assert f"{tmp_path / 'dog-000002'} is a file" in told


@pytest.mark.parametrize(("chosen", "extension"), [("ckpt", ".ckpt"), (None, ".safetensors")])
def test_a_folder_in_the_place_of_a_model_file_is_refused(chosen: str | None, extension: str, tmp_path: Path) -> None:
    for name in (f"m{extension}", f"m-step00000010{extension}"):
        (tmp_path / name).mkdir()
        (told,) = output_problems(ModelOutputOptions(output_dir=str(tmp_path), output_name="m", save_model_as=chosen))
        assert f"{tmp_path / name} is a folder" in told
        (tmp_path / name).rmdir()
    (tmp_path / f"m{extension}").touch()
    assert output_problems(ModelOutputOptions(output_dir=str(tmp_path), output_name="m", save_model_as=chosen)) == []


def test_a_folder_of_something_else_in_the_place_of_a_state_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "at-step00000010-state"
    state.mkdir()
    (state / "diary.txt").touch()
    (told,) = output_problems(OutputOptions(output_dir=str(tmp_path)))
    assert str(state) in told and "train_state.json" in told
    (state / "train_state.json").touch()
    assert output_problems(OutputOptions(output_dir=str(tmp_path))) == []


def test_saving_can_be_checked_without_torch() -> None:
    code = "import sys, library.training.outputs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
