from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from library.options.errors import UserError
from library.options.groups.output import OutputOptions
from library.options.groups.state import StateOptions
from library.training.outputs import SavePlan
from library.training.position import Position
from library.training.saving import Saver
from library.training.state import read_place, save_state
from tests.training.fake_run import SEED, FakeRun, dataset


def make_saver(run: FakeRun, folder: Path, **output: object) -> Saver:
    options = OutputOptions(output_dir=str(folder), output_name="net", **output)
    return Saver(
        plan=SavePlan.of(options, StateOptions(save_state=True), ".pt", num_epochs=3),
        trainable=run.trainable,
        live=run.live,
        dtype=None,
        metadata=lambda stem, position: {"stem": stem},
        averaged=nullcontext,
        writes=True,
        seed=SEED,
        batches_per_epoch=5,
    )


def train_and_save(folder: Path, **output: object) -> set[str]:
    run = FakeRun(dataset(5), updates=15)
    run.run.observers = [make_saver(run, folder, **output)]
    run.train()
    return {path.name for path in folder.iterdir()}


def test_old_steps_go_when_new_ones_are_whole(tmp_path: Path) -> None:
    left = train_and_save(tmp_path, save_every_n_steps=5, save_last_n_steps=5, save_last_n_steps_state=1)
    assert left == {
        "net-step00000010.pt",
        "net-step00000015.pt",
        "net-step00000015-state",
        "net.pt",
        "net-state",
    }


def test_the_state_of_an_epoch_continues_with_the_next_one(tmp_path: Path) -> None:
    train_and_save(tmp_path, save_every_n_epochs=1)
    assert read_place(tmp_path / "net-000002-state").position == Position(epoch=3, batch=0, update=10)
    assert not (tmp_path / "net-000003.pt").exists()


def test_whoever_wants_to_know_is_told_of_what_is_complete_on_disk(tmp_path: Path) -> None:
    run, told = FakeRun(dataset(5), updates=5), []
    saver = make_saver(run, tmp_path, save_every_n_steps=3)
    saver.after_save.append(lambda saved: told.append((saved.path.name, saved.what, saved.kind, saved.path.exists())))
    run.run.observers = [saver]
    run.train()
    assert told == [
        ("net-step00000003.pt", "model", "step", True),
        ("net-step00000003-state", "state", "step", True),
        ("net.pt", "model", "final", True),
        ("net-state", "state", "final", True),
    ]


def fail(path: Path, *_: object) -> None:
    raise UserError(f"{path} could not be written: the disk is full.")


def test_a_save_that_fails_in_mid_run_is_told_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = FakeRun(dataset(5), updates=3)
    saver = make_saver(run, tmp_path, save_every_n_steps=1)
    good = saver.trainable.save
    saver.trainable.save = fail  # type: ignore[method-assign]
    saver.after_update(Position(update=1))
    saver.trainable.save = good  # type: ignore[method-assign]
    run.run.observers = [saver]
    run.train()
    assert "the disk is full" in caplog.text and "Training goes on" in caplog.text
    assert (tmp_path / "net.pt").exists()


def full_disk(saver: Saver, full: Path) -> None:
    """Let a saver fail to write models below a folder, and below all others once they are named too."""
    good = saver.trainable.save

    def save(path: Path, *more: object) -> None:
        if full in path.parents:
            raise UserError(f"{path} could not be written: the disk is full.")
        good(path, *more)  # type: ignore[arg-type]

    saver.trainable.save = save  # type: ignore[method-assign]


@pytest.mark.parametrize("current_is_full", [False, True])
def test_what_a_full_disk_does_not_take_at_the_end_lies_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, current_is_full: bool
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "out" / "here").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "out" / "here" if current_is_full else tmp_path / "here")
    run = FakeRun(dataset(5), updates=1)
    saver = make_saver(run, tmp_path / "out")
    full_disk(saver, tmp_path / "out")
    run.run.observers = [saver]
    with pytest.raises(UserError, match="the disk is full") as told:
        run.train()
    (elsewhere,) = (tmp_path / ("temporary" if current_is_full else "here")).glob("atelier-*/net.pt")
    assert f"The trained model is in {elsewhere}: move it" in str(told.value)
    weights, _ = torch.load(elsewhere, weights_only=True)
    assert all(torch.equal(weights[name], tensor) for name, tensor in run.weights().items())
    assert (tmp_path / "out" / "net-state").is_dir()  # what can be written where it belongs is written there


def test_a_model_that_no_folder_takes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    run = FakeRun(dataset(5), updates=1)
    saver = make_saver(run, tmp_path / "out")
    full_disk(saver, tmp_path)
    with pytest.raises(UserError, match=r"out/net\.pt could not be written: the disk is full"):
        saver.after_training(Position(update=1))
    assert not list(tmp_path.glob("atelier-*")) and not list(tmp_path.glob("temporary/*")), "no empty folder is left"
    assert read_place(tmp_path / "out" / "net-state").update == 1, "the state is saved although the model is not"


def test_a_stopped_run_saves_elsewhere_too_and_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = FakeRun(dataset(5), updates=1)
    run.train()
    saver = make_saver(run, tmp_path / "out")
    (tmp_path / "out").touch()
    state = saver.save_interrupted(Position(batch=1, update=1))
    assert state.parent.parent == tmp_path and state.parent.name.startswith("atelier-")
    assert read_place(state).position == Position(batch=1, update=1)
    assert (state.parent / "net-step00000001.pt").is_file()


def test_a_stopped_run_has_its_state_even_where_no_folder_takes_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    saver = make_saver(FakeRun(dataset(5), updates=1), tmp_path / "out")
    full_disk(saver, tmp_path)
    state = saver.save_interrupted(Position(batch=1, update=1))
    assert state == tmp_path / "out" / "net-step00000001-state"
    assert read_place(state).position == Position(batch=1, update=1)
    assert "The trained model could not be saved" in caplog.text


def test_a_network_of_another_package_is_written_whole_or_not_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = FakeRun(dataset(5), updates=2)
    saver = make_saver(run, tmp_path, save_every_n_steps=1)
    saver.after_update(Position(update=1))
    whole = (tmp_path / "net-step00000001.pt").read_bytes()

    def tear(path: str, *_: object) -> None:
        assert path.endswith(".pt")
        Path(path).write_bytes(b"half")
        raise RuntimeError("No space left on device")

    run.network.save_weights = tear  # type: ignore[method-assign]
    saver.after_update(Position(update=1))
    assert "Saving failed. Training goes on" in caplog.text and "No space left on device" in caplog.text
    assert (tmp_path / "net-step00000001.pt").read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {"net-step00000001.pt", "net-step00000001-state"}


def test_a_state_that_cannot_be_written_leaves_no_part_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(dataset(5), updates=1)
    run.train()

    def fill_the_disk(*_: object) -> None:
        raise UserError("model.safetensors could not be written") from OSError(28, "No space left on device")

    monkeypatch.setattr("library.training.state.save_safetensors", fill_the_disk)
    with pytest.raises(UserError, match=r"net-state could not be written: \[Errno 28\] No space left"):
        save_state(tmp_path / "net-state", run.live, Position(), SEED, 5, {})
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_became_a_file_is_told_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver = make_saver(FakeRun(dataset(5), updates=3), tmp_path / "out", save_every_n_steps=1)
    (tmp_path / "out").touch()
    saver.after_update(Position(update=1))
    assert f"{tmp_path / 'out'} could not be written: a file of that name is in the way." in caplog.text
