import io
import json
import logging
import math
import sys
import types
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from library.options.errors import UserError
from library.options.groups.logging import LoggingOptions
from library.training.async_scalars import AsyncScalars
from library.training.logs import (
    LossRecorder,
    RunSummary,
    TrainingLog,
    measured,
    progress_figures,
)
from library.training.position import Position
from library.training.progress import Progress
from library.training.scalar_names import SCALAR_NAMES, rate_scalars
from library.training.trackers import RunLog, tracker_kinds

REFERENCE = json.loads((Path(__file__).parents[1] / "compat" / "training_reference_values.json").read_text(encoding="utf-8"))
STARTED = datetime(2024, 5, 6, 7, 8, 9)


def averages(adds: list[list[float]], recorder: LossRecorder) -> list[float]:
    found = []
    for epoch, index, loss in adds:
        recorder.add(int(epoch) + 1, int(index), loss)
        found.append(recorder.average)
    return found


@pytest.mark.parametrize(
    "name", ["two_epochs_of_three", "validation_twice_in_epoch0_appends", "validation_twice_in_epoch1_replaces"]
)
def test_the_running_loss_is_the_average_over_a_window_of_one_epoch(name: str) -> None:
    case = REFERENCE["loss_recorder"][name]
    assert averages(case["adds_epoch_step_loss"], LossRecorder()) == case["moving_average_after_each"]


def test_batches_never_seen_do_not_dilute_the_running_loss() -> None:
    adds = REFERENCE["loss_recorder"]["start_in_epoch_1_at_step_2_zero_padding"]["adds_epoch_step_loss"]
    assert averages(adds, LossRecorder()) == [6.0, 4.0]


def test_a_resumed_running_loss_goes_on_as_if_nothing_had_happened() -> None:
    adds = [[0, 0, 0.1], [0, 1, 0.2], [0, 2, 0.7], [1, 0, 0.3], [1, 1, 0.5], [1, 2, 0.9]]
    whole = averages(adds, LossRecorder())
    before, after = LossRecorder(), LossRecorder()
    first = averages(adds[:4], before)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert first + averages(adds[4:], after) == whole


def test_the_running_loss_is_nan_before_the_first_batch() -> None:
    assert math.isnan(LossRecorder().average)


def test_numbers_arrive_in_order_with_their_tags_and_as_they_were_when_sent() -> None:
    feed, value = AsyncScalars(), torch.zeros(())
    for tag in "abc":
        value += 1
        feed.push(tag, value)
    assert list(feed.ready()) == [("a", 1.0), ("b", 2.0), ("c", 3.0)]
    assert list(feed.drain()) == []


@pytest.mark.gpu
def test_sending_a_number_from_a_busy_gpu_does_not_wait() -> None:
    feed = AsyncScalars()
    feed.push("first", torch.zeros((), device="cuda"))  # takes page-locked memory, which may wait for the device
    assert list(feed.drain()) == [("first", 0.0)]
    torch.cuda._sleep(200_000_000)
    feed.push("late", torch.full((), 3.0, device="cuda") * 2)
    assert list(feed.ready()) == []
    assert list(feed.drain()) == [("late", 6.0)]


def test_learning_rates_are_one_series_per_group_named_by_what_it_trains() -> None:
    groups = [{"lr": 1e-4}, {"lr": 2e-4, "d": 0.5}, {"lr": 3e-4}]
    assert rate_scalars(groups, ["textencoder 1", "unet"]) == {
        "lr/textencoder 1": 1e-4,
        "lr/unet": 2e-4,
        "lr/d*lr/unet": 1e-4,
        "lr/group2": 3e-4,
    }


def test_networks_have_rates_by_number_too_as_older_dashboards_want_them() -> None:
    groups = [{"lr": 1e-4, "d": 0.5}, {"lr": 2e-4, "d": 0.25}]
    by_part = {"lr/te": 1e-4, "lr/d*lr/te": 5e-5, "lr/unet": 2e-4, "lr/d*lr/unet": 5e-5, "lr/d*lr": 5e-5}
    second = {"lr/group1": 2e-4, "lr/d*lr/group1": 5e-5}
    with_text = rate_scalars(groups, ["te", "unet"], "parts and numbers", trains_text=True)
    assert with_text == {**by_part, "lr/textencoder": 1e-4, **second}
    first = {"lr/group0": 1e-4, "lr/d*lr/group0": 5e-5}
    assert rate_scalars(groups, ["te", "unet"], "parts and numbers") == {**by_part, **first, **second}
    assert rate_scalars(groups, ["te", "unet"], "one") == {"lr": 1e-4, "lr/d*lr": 5e-5}


@pytest.mark.parametrize(
    ("project", "script"),
    [
        ("network_train", "sdxl_train_network"),
        ("finetuning", "sdxl_train"),
        ("textual_inversion", "sdxl_train_textual_inversion"),
        ("lllite_control_net_train", "sdxl_train_control_net_lllite"),
        ("sdxl_control_net_train", "sdxl_train_control_net"),
    ],
)
def test_every_script_uses_the_names_its_dashboards_know(project: str, script: str) -> None:
    known, names = REFERENCE["logged_scalars"][script], SCALAR_NAMES[project]
    assert known["tracker"] == project
    assert known["per_epoch_step=epoch"] == [names.epoch_loss]
    rates = rate_scalars([{"lr": 1.0, "d": 1.0}], ["<description>"], names.rates)
    by_batch = {each.replace("<i>", "0").replace("<name>", "<description>") for each in known["per_batch_step=global_step"]}
    wanted = {"lr/<description>"} if project == "finetuning" else set()  # whose parts the table lists by name
    assert {names.loss, *rates} <= by_batch | wanted


def test_zeros_of_networks_that_limit_no_norms_are_no_measurement() -> None:
    limits = ("max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm", "grad_norm/all")
    assert measured(limits, [0.0, 0.0, 0.0, 2.0]) == {"grad_norm/all": 2.0}
    assert measured(limits, [0.0, 0.5, 0.9, 2.0]) == dict(zip(limits, [0.0, 0.5, 0.9, 2.0], strict=True))


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_files_lie_where_front_ends_look_and_hold_the_values(tmp_path: Path) -> None:
    options = LoggingOptions(logging_dir=str(tmp_path), log_prefix="cat-")
    log = RunLog.open(options, "network_train", None, STARTED)
    log.step({"loss/current": 0.5}, step=1, epoch=1)
    log.step({"loss/current": 0.25}, step=2, epoch=1)
    log.epoch({"loss/epoch_average": 0.375}, epoch=1, step=2)
    log.close()
    assert read_scalars(tmp_path / "cat-20240506070809" / "network_train") == {
        "loss/current": [(1, 0.5), (2, 0.25)],
        "loss/epoch_average": [(1, 0.375)],
    }


def test_the_tracker_name_is_as_given(tmp_path: Path) -> None:
    log = RunLog.open(LoggingOptions(logging_dir=str(tmp_path), log_tracker_name="cats"), "network_train", None, STARTED)
    log.close()
    assert [path.name for path in (tmp_path / "20240506070809").iterdir()] == ["cats"]


def test_options_are_stored_where_there_are_any(tmp_path: Path) -> None:
    for folder, config in (("without", None), ("with", {"seed": 7})):
        RunLog.open(LoggingOptions(logging_dir=str(tmp_path / folder)), "network_train", config, STARTED).close()
    without, stored = (
        b"".join(file.read_bytes() for file in (tmp_path / folder).rglob("events*")) for folder in ("without", "with")
    )
    assert b"seed" not in without
    assert b'"seed": 7' in stored


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        (LoggingOptions(), []),
        (LoggingOptions(logging_dir="logs"), ["tensorboard"]),
        (LoggingOptions(log_with="wandb"), ["wandb"]),
        (LoggingOptions(log_with="all", logging_dir="logs"), ["tensorboard", "wandb"]),
    ],
)
def test_a_logging_folder_alone_means_tensorboard(options: LoggingOptions, kinds: list[str]) -> None:
    assert tracker_kinds(options) == kinds


def test_tensorboard_without_a_folder_says_what_is_missing() -> None:
    with pytest.raises(UserError, match="--logging_dir"):
        RunLog.open(LoggingOptions(log_with="tensorboard"), "network_train", None, STARTED)


def test_wandb_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        RunLog.open(LoggingOptions(log_with="wandb"), "network_train", None, STARTED)


class Wandb(types.ModuleType):
    """What is used of the wandb package, writing down what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.told: list[Any] = []

    def login(self, key: str) -> None:
        self.told.append(("login", key))

    def init(self, **arguments: Any) -> "Wandb":
        self.told.append(("init", arguments))
        return self

    def Image(self, image: Any, caption: str) -> Any:
        return (image, caption)

    def log(self, values: dict[str, Any], commit: bool = True) -> None:
        self.told.append((values, commit))

    def finish(self) -> None:
        self.told.append("finish")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wandb]:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    yield fake
    monkeypatch.delenv("WANDB_DIR", raising=False)


def test_wandb_receives_positions_as_fields_and_pictures_uncommitted(wandb: Wandb, tmp_path: Path) -> None:
    config = tmp_path / "trackers.toml"
    config.write_text('[wandb]\ntags = ["cat"]\n', encoding="utf-8")
    options = LoggingOptions(log_with="wandb", wandb_api_key="k", wandb_run_name="run", log_tracker_config=str(config))
    log = RunLog.open(options, "network_train", {"seed": 7}, STARTED)
    log.step({"loss/current": 0.5}, step=3, epoch=2)
    picture = tmp_path / "picture.png"
    picture.touch()
    log.sample(0, picture, "a cat")
    log.sample(1, tmp_path / "on another machine.png", "a dog")
    log.close()
    arguments = {"project": "network_train", "config": {"seed": 7}, "tags": ["cat"], "name": "run"}
    assert wandb.told == [
        ("login", "k"),
        ("init", arguments),
        ({"loss/current": 0.5, "global_step": 3, "epoch": 2}, True),
        ({"sample_0": (str(picture), "a cat")}, False),
        "finish",
    ]


@pytest.mark.parametrize(("typed", "name"), [("typed", "typed"), (None, "in the file")])
def test_a_tracker_file_names_the_run_where_the_command_line_does_not(
    wandb: Wandb, typed: str | None, name: str, tmp_path: Path
) -> None:
    config = tmp_path / "trackers.toml"
    config.write_text('[wandb]\nname = "in the file"\n', encoding="utf-8")
    RunLog.open(LoggingOptions(log_with="wandb", wandb_run_name=typed, log_tracker_config=str(config)), "t", None, STARTED)
    assert wandb.told[0][1]["name"] == name


@pytest.mark.parametrize(("text", "told"), [("[tensorbord]\n", "tensorbord"), ("wandb = 1\n", "wandb"), ("[wandb\n", "TOML")])
def test_a_wrong_tracker_file_is_told_by_name(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "trackers.toml"
    path.write_text(text, encoding="utf-8")
    options = LoggingOptions(logging_dir=str(tmp_path), log_tracker_config=str(path))
    with pytest.raises(UserError, match=told):
        RunLog.open(options, "network_train", None, STARTED)


def test_a_missing_tracker_file_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.toml"):
        RunLog.open(LoggingOptions(logging_dir="x", log_tracker_config=str(tmp_path / "missing.toml")), "t", None, STARTED)


def train(log: TrainingLog, losses: list[list[float]], accumulation: int = 1, start: Position | None = None) -> Position:
    """Call a log as a loop over epochs of `losses` does."""
    position = start or Position()
    log.before_training(position)
    for epoch in losses:
        for index, loss in enumerate(epoch, start=position.batch):
            log.observe_loss(torch.tensor(loss))
            if (index + 1) % accumulation == 0:
                position = position.after_update(index + 1)
                log.after_update(position)
        log.after_epoch(position)
        position = position.next_epoch()
    log.after_training(position)
    return position


def training_log(tmp_path: Path, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> TrainingLog:
    monkeypatch.setattr(sys, "stderr", stream)
    trackers = RunLog.open(LoggingOptions(logging_dir=str(tmp_path)), "network_train", None, STARTED)
    groups = [{"lr": 1e-4}]
    return TrainingLog(trackers, Progress(total=4, initial=0, visible=True), lambda: groups, ["unet"])


def test_a_run_is_recorded_by_update_and_by_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    log = training_log(tmp_path, stream, monkeypatch)
    train(log, [[4.0, 2.0], [1.0, 1.0]])
    log.close()
    written = read_scalars(tmp_path / "20240506070809" / "network_train")
    assert written["loss/current"] == [(1, 4.0), (2, 2.0), (3, 1.0), (4, 1.0)]
    assert written["loss/average"] == [(1, 4.0), (2, 3.0), (3, 1.5), (4, 1.0)]
    assert written["loss/epoch_average"] == [(1, 3.0), (2, 1.0)]
    assert written["lr/unet"][0] == (1, pytest.approx(1e-4))
    assert "steps: 100%" in stream.getvalue()
    assert "avr_loss=1, lr=0.0001" in stream.getvalue()


def test_accumulated_batches_share_the_update_they_contribute_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = training_log(tmp_path, io.StringIO(), monkeypatch)
    train(log, [[1.0, 2.0, 3.0, 4.0]], accumulation=2)
    log.close()
    written = read_scalars(tmp_path / "20240506070809" / "network_train")
    assert written["loss/current"] == [(1, 1.0), (1, 2.0), (2, 3.0), (2, 4.0)]


def test_a_resumed_log_goes_on_at_the_step_and_loss_it_stopped_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = training_log(tmp_path / "first", io.StringIO(), monkeypatch)
    position = train(first, [[4.0, 2.0]])
    second = training_log(tmp_path / "second", io.StringIO(), monkeypatch)
    second.losses.load_state_dict(first.state_dict())
    train(second, [[1.0, 1.0]], start=position)
    second.close()
    assert read_scalars(tmp_path / "second" / "20240506070809" / "network_train")["loss/average"] == [(3, 1.5), (4, 1.0)]


def test_a_bar_that_is_not_visible_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress(total=2, initial=0, visible=False)
    progress.show({"avr_loss": "0.5"})
    progress.advance()
    progress.close()
    assert stream.getvalue() == ""


def test_a_resumed_bar_starts_where_the_run_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    Progress(total=4, initial=3, visible=True).close()
    assert "75%" in stream.getvalue()
    assert "3/4" in stream.getvalue()


def test_time_before_the_first_step_is_not_counted_as_training(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = io.StringIO(), [1000.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    log = TrainingLog(RunLog(), Progress(total=4, initial=0, visible=True), lambda: [{"lr": 1.0}], [])
    log.before_training(Position())
    clock[0] += 3600  # sample images before the first step
    for update in range(4):
        log.observe_loss(torch.tensor(1.0))
        clock[0] += 30
        log.after_update(Position(1, update + 1, update + 1))
    log.close()
    assert "4/4 [02:00<00:00, 30.00s/it" in stream.getvalue()


def test_limiting_norms_shows_behind_the_bar() -> None:
    norms = {"max_norm/keys_scaled": 3.0, "norm/avg_key_norm": 0.25, "max_norm/max_key_norm": 0.9}
    figures = progress_figures(0.5, {"lr/unet": 1e-4, "lr/group1": 2e-4}, norms)
    assert figures == {"avr_loss": "0.5", "lr": "0.0001", "Keys Scaled": "3", "Average key norm": "0.25"}


def test_messages_stand_on_lines_of_their_own_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    console = logging.StreamHandler(stream)
    root = logging.getLogger()
    root.addHandler(console)
    try:
        progress = Progress(total=2, initial=0, visible=True)
        logging.getLogger("a run").error("saved")
        progress.close()
        assert console in root.handlers
    finally:
        root.removeHandler(console)
    line = next(line for line in stream.getvalue().split("\n") if "saved" in line)
    assert line.split("\r")[-1] == "saved"


def test_the_lines_at_the_start_tell_every_figure() -> None:
    summary = RunSummary(
        num_train_images=120,
        num_reg_images=40,
        num_validation_images=5,
        batches_per_epoch=31,
        num_epochs=7,
        batch_sizes=[4, 2, 4],
        num_processes=2,
        accumulation=3,
        total_updates=77,
        loss_terms=["loss: l2", "weight: min-SNR 5"],
    )
    text = "\n".join(summary.lines())
    for figure in ("120", "40", "5", "31", "7", "2, 4", "processes: 2", "accumulation: 3", "77", "loss: l2", "weight: min-SNR 5"):
        assert figure in text
