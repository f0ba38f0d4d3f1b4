"""The event file: every line stands for itself, and nothing about it can stop a run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from library.options.errors import UserError
from library.training.events import EventLog, RunEnd, events_of_run
from library.training.logs import TrainingLog
from library.training.position import Position
from library.training.progress import Progress
from library.training.step_meter import StepMeter
from library.training.trackers import RunLog


def events(path: Path) -> list[dict[str, Any]]:
    """Read an event file; the time, which every line has, is left out."""
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    times = [event.pop("time") for event in read]
    assert times == sorted(times)
    return read


def test_a_line_is_on_disk_when_it_is_written_and_holds_any_value(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "new" / "events.jsonl")
    log.write("saved", path=Path("猫.safetensors"), loss=float("nan"), sizes=(1, 2.5), rates={"unet": 1e-4}, whole=None)
    (event,) = events(tmp_path / "new" / "events.jsonl")
    assert event == {
        "kind": "saved", "path": "猫.safetensors", "loss": None, "sizes": [1, 2.5], "rates": {"unet": 1e-4}, "whole": None,
    }  # fmt: skip
    log.close()
    log.write("step", step=1)
    assert len(events(tmp_path / "new" / "events.jsonl")) == 1


def test_another_run_goes_on_below_what_is_there_even_where_a_kill_tore_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "step"}\n{"kind": "st', encoding="utf-8")
    log = EventLog(path)
    log.write("start", step=5)
    log.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ['{"kind": "step"}', '{"kind": "st']
    assert json.loads(lines[2])["step"] == 5


def test_warnings_and_errors_of_the_console_are_events_until_the_run_is_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with events_of_run(path):
        logging.getLogger("a room").warning("%d images are missing", 3)
        logging.getLogger("a room").error("not saved")
        logging.getLogger("a room").info("nothing to see")
    logging.getLogger("a room").warning("later")
    *told, end = events(path)
    assert told == [{"kind": "warning", "message": "3 images are missing"}, {"kind": "error", "message": "not saved"}]
    assert (end["kind"], end["outcome"], end["message"]) == ("end", "complete", None)


@pytest.mark.parametrize(
    ("error", "outcome", "told"),
    [
        (UserError("The disk is full."), "failed", "The disk is full."),
        (ZeroDivisionError("division"), "failed", "ZeroDivisionError: division"),
        (SystemExit(130), "stopped", None),
        (KeyboardInterrupt(), "stopped", None),
    ],
)
def test_the_last_event_tells_how_the_run_ended(error: BaseException, outcome: str, told: str | None, tmp_path: Path) -> None:
    ends: list[RunEnd] = []

    def run() -> None:
        with events_of_run(tmp_path / "events.jsonl") as log:
            log.at_end.append(ends.append)
            raise error

    with pytest.raises(type(error)):
        run()
    *errors, end = events(tmp_path / "events.jsonl")
    assert errors == ([] if told is None else [{"kind": "error", "message": told}])
    assert (end["kind"], end["outcome"], end["message"]) == ("end", outcome, told)
    assert ends == [RunEnd(outcome, told, end["seconds"])]


def test_only_the_first_of_several_processes_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with events_of_run(tmp_path / "events.jsonl") as log:
        log.write("step", step=1)
    assert not (tmp_path / "events.jsonl").exists()


def test_a_file_that_cannot_be_written_is_told_once_and_costs_only_the_events(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder").mkdir()
    EventLog(tmp_path / "folder").write("step", step=1)
    assert "--log_events" in caplog.text
    caplog.clear()
    full = EventLog(tmp_path / "events.jsonl")
    full._file = Path("/dev/full").open("a")  # noqa: SIM115  # every write to it fails
    for step in range(3):
        full.write("step", step=step)
    full.close()
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text


def test_a_step_is_told_when_its_losses_have_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [50.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    path, groups = tmp_path / "events.jsonl", [{"lr": 1e-4}, {"lr": 2e-4, "d": 0.5}]
    meter = StepMeter()
    bar = Progress(total=2, initial=0, visible=False)
    log = TrainingLog(RunLog(), bar, lambda: groups, ["unet", "te1"], events=EventLog(path), meter=meter)
    for observer in (log, meter):
        observer.before_training(Position(epoch=2, batch=0, update=7))
    for loss in (2.0, 4.0):
        log.observe_loss(torch.tensor(loss))
        assert not events(path)
    clock[0] += 1.5
    for observer in (log, meter):
        observer.after_update(Position(epoch=2, batch=2, update=8))
        clock[0] += 60  # a saved file, say
    clock[0] -= 60
    (event,) = events(path)
    assert event.pop("memory") > 2**20
    assert event == {
        "kind": "step", "step": 8, "epoch": 2, "loss": 3.0, "average": 3.0,
        "lr": {"unet": 1e-4, "te1": 2e-4, "d*lr/te1": 1e-4}, "seconds": 1.5,
    }  # fmt: skip
    log.observe_loss(torch.tensor(1.0))
    clock[0] += 2.0
    log.after_update(Position(epoch=2, batch=4, update=9))
    assert events(path)[1]["seconds"] == 2.0
