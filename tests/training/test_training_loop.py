import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from library.options.errors import UserError
from library.options.scripts import SdxlTrainOptions
from library.training.interrupt import StopRequest
from library.training.logs import LossRecorder
from library.training.loop import batch_seed
from library.training.position import Position, window_size
from library.training.recipe import load_saved
from library.training.resume_command import launcher, resume_command, secrets_given, words_before_script
from library.training.state import SavedPlace, load_state, read_place, save_state
from tests.training.fake_run import SEED, FakeRun, Recorder, dataset, state_folder
from tests.training.test_training_saving import make_saver


def test_training_lowers_the_loss_and_counts_what_it_did() -> None:
    recorder = Recorder()
    run = FakeRun(dataset(5), updates=40, observers=[recorder], lr=0.05)
    end = run.train()
    assert end == Position(epoch=9, batch=0, update=40)
    assert sum(run.losses[-10:]) < 0.9 * sum(run.losses[:10])
    assert [event for event, _ in recorder.events].count("epoch") == 8
    assert recorder.events[0] == ("before", Position()) and recorder.events[-1] == ("end", end)


def test_accumulated_batches_give_the_gradient_of_one_large_batch() -> None:
    small, large = FakeRun(dataset(4), updates=3, accumulation=4), FakeRun(dataset(4, batch_size=4), updates=3)
    for run in (small, large):
        run.network.dropout.p = 0.0
        run.train()
    for name, tensor in large.weights().items():
        torch.testing.assert_close(small.weights()[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_last_update_of_an_epoch_takes_what_is_left() -> None:
    assert [window_size(batch, 5, 2) for batch in range(5)] == [2, 2, 2, 2, 1]
    recorder = Recorder()
    FakeRun(dataset(5), updates=6, accumulation=2, observers=[recorder]).train()
    updates = [(p.epoch, p.batch) for event, p in recorder.events if event == "update"]
    assert updates == [(1, 2), (1, 4), (1, 5), (2, 2), (2, 4), (2, 5)]


@pytest.mark.parametrize(("stop_at", "accumulation"), [(3, 1), (5, 1), (7, 1), (2, 2), (3, 2)])
def test_a_run_resumed_anywhere_ends_with_the_same_weights_bit_for_bit(tmp_path: Path, stop_at: int, accumulation: int) -> None:
    whole = FakeRun(dataset(5), updates=12, accumulation=accumulation)
    whole.train()
    first = FakeRun(dataset(5), updates=stop_at, accumulation=accumulation)
    save_state(state_folder(tmp_path), first.live, first.train(), SEED, 5, {})

    second = FakeRun(dataset(5), updates=12, accumulation=accumulation)
    load_state(state_folder(tmp_path), second.live)
    place = read_place(state_folder(tmp_path))
    assert place.position is not None and place.update == stop_at
    second.train(place.position)
    assert all(torch.equal(second.weights()[name], tensor) for name, tensor in whole.weights().items())
    assert second.losses == whole.losses[len(first.losses) :]


def test_a_run_killed_again_and_again_goes_on_from_its_last_states(tmp_path: Path) -> None:
    """The states are those of a step, of an epoch, and of a step again."""
    whole = FakeRun(dataset(5), updates=12, accumulation=2)
    whole.train()
    starts = []
    for deaths_after in (5, 2, 4, 99):  # batches: in an epoch's last one, within an update of the next epoch twice, never
        run = FakeRun(dataset(5), updates=12, accumulation=2)
        run.run.observers = [make_saver(run, tmp_path, save_every_n_steps=2, save_every_n_epochs=1)]
        run.run.observe_loss = dying(run, deaths_after)
        states = sorted(tmp_path.glob("*-state"), key=lambda state: read_place(state).update)
        place = Position()
        if states:
            load_state(states[-1], run.live)
            place = read_place(states[-1]).position or place
        starts.append(place.update)
        with suppress(KeyboardInterrupt):
            run.train(place)
    assert starts == [0, 2, 3, 4]
    assert all(torch.equal(run.weights()[name], tensor) for name, tensor in whole.weights().items())
    assert {path.name for path in tmp_path.glob("*.pt")} == {
        *(f"net-step000000{n:02}.pt" for n in (2, 4, 6, 8, 10, 12)), *(f"net-00000{n}.pt" for n in (1, 2)), "net.pt",
    }  # fmt: skip


def dying(run: FakeRun, after: int) -> Callable[[torch.Tensor], None]:
    """Observe losses until so many batches were seen."""

    def observe(loss: torch.Tensor) -> None:
        run.losses.append(loss.item())
        if len(run.losses) == after:
            raise KeyboardInterrupt

    return observe


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_ends_the_run(number: signal.Signals) -> None:
    recorder = Recorder(on_update=lambda position: os.kill(os.getpid(), number) if position.update == 3 else None)
    run = FakeRun(dataset(5), updates=20, observers=[recorder])
    with StopRequest() as stop:
        end = run.train(stop=stop)
    assert end.update == 3 and stop.signal == number
    assert "end" not in [event for event, _ in recorder.events]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_that_is_stopped_in_its_last_step_is_complete() -> None:
    recorder = Recorder(on_update=lambda position: os.kill(os.getpid(), signal.SIGINT) if position.update == 3 else None)
    run = FakeRun(dataset(5), updates=3, observers=[recorder])
    with StopRequest() as stop:
        run.train(stop=stop)
    assert stop.agreed and [event for event, _ in recorder.events][-1] == "end"


def test_a_second_ctrl_c_stops_at_once_but_the_echo_of_a_launcher_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("library.training.interrupt.time.monotonic", lambda: clock[0])
    monkeypatch.setenv("LOCAL_RANK", "0")
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 0.5
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGINT
        clock[0] += 3
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_without_a_launcher_the_second_ctrl_c_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_places_follow_from_the_number_of_updates() -> None:
    assert Position.at_update(7, batches_per_epoch=5, accumulation=2) == Position(epoch=3, batch=2, update=7)
    assert Position.at_update(6, batches_per_epoch=5, accumulation=2) == Position(epoch=3, batch=0, update=6)


def test_batch_seeds_differ_in_every_argument() -> None:
    seeds = {batch_seed(*arguments) for arguments in [(1, 1, 0, 0), (2, 1, 0, 0), (1, 2, 0, 0), (1, 1, 1, 0), (1, 1, 0, 1)]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_state_of_sd_scripts_goes_on_with_its_weights_averages_and_schedule(tmp_path: Path) -> None:
    """It is what accelerate writes of network, optimizer and schedule, and a train_state.json of two numbers."""
    theirs = FakeRun(dataset(5), updates=7)
    accelerator = Accelerator(cpu=True)
    inner = theirs.live.optimizer.optimizer
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, partial(falling, total=20))
    accelerator.prepare(theirs.network, inner, schedule)
    theirs.run.schedule = schedule
    theirs.train()
    accelerator.save_state(str(state_folder(tmp_path)))
    (state_folder(tmp_path) / "train_state.json").write_text('{"current_epoch": 2, "current_step": 7}')

    place = read_place(state_folder(tmp_path))
    assert (place.position, place.epoch, place.update, place.identity) == (None, 2, 7, None)
    ours = FakeRun(dataset(5), updates=8)
    ours.live.schedule = torch.optim.lr_scheduler.LambdaLR(ours.live.optimizer.optimizer, lambda k: falling(k, total=20))
    load_state(state_folder(tmp_path), ours.live)
    assert all(torch.equal(ours.weights()[name], tensor) for name, tensor in theirs.weights().items())
    moments = [[state["exp_avg"] for state in run.optimizer.state.values()] for run in (theirs, ours)]
    assert all(torch.equal(one, other) and one.any() for one, other in zip(*moments, strict=True))
    assert ours.live.schedule.last_epoch == 7 and ours.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 13 / 20)


def falling(k: int, total: int) -> float:
    return 1 - k / total


def test_saving_a_state_again_replaces_it_and_leaves_nothing_else(tmp_path: Path) -> None:
    run = FakeRun(dataset(5), updates=2)
    end = run.train()
    for _ in range(2):
        save_state(state_folder(tmp_path), run.live, end, SEED, 5, {"losses": [0.1]})
    assert [path.name for path in tmp_path.iterdir()] == [state_folder(tmp_path).name]
    assert read_place(state_folder(tmp_path)).losses == {"losses": [0.1]}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def rewrite(folder: Path, **values: Any) -> None:
    saved = json.loads((folder / "train_state.json").read_text())
    (folder / "train_state.json").write_text(json.dumps(saved | values))


def forget_sizes(folder: Path) -> None:
    saved = json.loads((folder / "train_state.json").read_text())
    (folder / "train_state.json").write_text(json.dumps({key: value for key, value in saved.items() if key != "files"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "train_state.json").unlink(), "has no train_state.json"),
        (lambda folder: (folder / "optimizer.bin").unlink(), "has no optimizer.bin"),
        (lambda folder: (folder / "extras" / "average.safetensors").unlink(), r"has no extras/average\.safetensors"),
        (lambda folder: (folder / "train_state.json").write_text("{"), r"train_state\.json is damaged: it cannot be read"),
        (lambda folder: rewrite(folder, current_batch=6), r"cannot be read .*batch 6 of 5"),
        (lambda folder: rewrite(folder, identity={"options": {}}), r"cannot be read .*'data'"),
        (lambda folder: rewrite(folder, identity=[1]), r"train_state\.json is damaged: it cannot be read"),
        (lambda folder: cut(folder / "scheduler.bin"), r"scheduler\.bin is damaged: it has [\d,]+ bytes and was written with"),
        (lambda folder: (forget_sizes(folder), cut(folder / "optimizer.bin")), r"optimizer\.bin is damaged: it has no end"),
        (lambda folder: (forget_sizes(folder), cut(folder / "model.safetensors")), r"model\.safetensors is damaged: .* cut short"),
        (shutil.rmtree, "there is no folder"),
    ],
)
def test_a_damaged_state_is_refused_with_a_sentence_before_a_model_is_loaded(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    run = FakeRun(dataset(5), updates=1)
    run.live.extras["average"] = torch.nn.BatchNorm1d(3)
    save_state(state_folder(tmp_path), run.live, run.train(), SEED, 5, {})
    damage(state_folder(tmp_path))
    with pytest.raises(UserError, match=f"{words}.*(another state|such as)"):
        read_place(state_folder(tmp_path))


def test_a_file_of_a_state_that_was_damaged_without_getting_shorter_is_named(tmp_path: Path) -> None:
    run = FakeRun(dataset(5), updates=1)
    save_state(state_folder(tmp_path), run.live, run.train(), SEED, 5, {})
    damaged = state_folder(tmp_path) / "optimizer.bin"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    read_place(state_folder(tmp_path))
    with pytest.raises(UserError, match=r"optimizer\.bin is damaged: .* choose another state folder"):
        load_state(state_folder(tmp_path), run.live)


def test_losses_of_a_state_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.training.recipe.load_state", lambda folder, live: None)
    saved = SavedPlace(tmp_path, None, 1, 5, losses={"total": 1.0})
    with pytest.raises(UserError, match=r"train_state\.json is damaged: its losses cannot be read"):
        load_saved(saved, SimpleNamespace(live=None), SimpleNamespace(losses=LossRecorder()))


def test_the_state_of_another_network_is_refused(tmp_path: Path) -> None:
    run = FakeRun(dataset(5), updates=1)
    save_state(state_folder(tmp_path), run.live, run.train(), SEED, 5, {})
    other = FakeRun(dataset(5), updates=1)
    other.network.text = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(UserError, match="something else was trained: text do not fit"):
        load_state(state_folder(tmp_path), other.live)
    assert json.loads((state_folder(tmp_path) / "train_state.json").read_text())["current_step"] == 1


def test_further_tensors_come_back_with_a_state_that_must_have_them(tmp_path: Path) -> None:
    run = FakeRun(dataset(5), updates=1)
    save_state(tmp_path / "without", run.live, run.train(), SEED, 5, {})
    run.live.extras["average"] = torch.nn.BatchNorm1d(3)
    torch.nn.init.uniform_(run.live.extras["average"].weight)
    save_state(state_folder(tmp_path), run.live, Position(update=1), SEED, 5, {})
    assert (state_folder(tmp_path) / "extras" / "average.safetensors").is_file()

    other = FakeRun(dataset(5), updates=1)
    other.live.extras["average"] = again = torch.nn.BatchNorm1d(3)
    load_state(state_folder(tmp_path), other.live)
    assert torch.equal(again.weight, run.live.extras["average"].weight)
    with pytest.raises(UserError, match=r"without has no extras/average\.safetensors"):
        load_state(tmp_path / "without", other.live)
    other.live.extras["average"] = torch.nn.BatchNorm1d(4)
    with pytest.raises(UserError, match="something else was trained: weight, bias, running_mean do not fit"):
        load_state(state_folder(tmp_path), other.live)


@pytest.mark.parametrize("named", [True, False], ids=["named in the state", "known by its settings"])
@pytest.mark.parametrize(
    ("saved", "now"), [("AdamW", "SGD"), ("AdamW", "Lion"), ("Lion", "AdamW"), ("AdamW", "AdamW8bit"), ("Lion8bit", "RAdam")]
)
def test_the_state_of_another_optimizer_is_refused(tmp_path: Path, saved: str, now: str, named: bool) -> None:
    run = FakeRun(dataset(5), updates=1, optimizer_type=saved)
    save_state(state_folder(tmp_path), run.live, run.train(), SEED, 5, {})
    if not named:
        (state_folder(tmp_path) / "train_state.json").write_text('{"current_epoch": 1, "current_step": 1}')
    other = FakeRun(dataset(5), updates=2, optimizer_type=now)
    with pytest.raises(UserError, match="--optimizer_type") as told:
        load_state(state_folder(tmp_path), other.live)
    assert (f".{saved}" in str(told.value)) == named


def test_a_state_without_the_optimizers_name_still_goes_on(tmp_path: Path) -> None:
    run = FakeRun(dataset(5), updates=2)
    save_state(state_folder(tmp_path), run.live, run.train(), SEED, 5, {})
    (state_folder(tmp_path) / "train_state.json").write_text('{"current_epoch": 1, "current_step": 2}')
    saved = torch.load(state_folder(tmp_path) / "optimizer.bin", weights_only=True)
    for group in saved["param_groups"]:
        del group["decoupled_weight_decay"]  # as an older PyTorch wrote it
    torch.save(saved, state_folder(tmp_path) / "optimizer.bin")
    other = FakeRun(dataset(5), updates=4)
    load_state(state_folder(tmp_path), other.live)
    whole = FakeRun(dataset(5), updates=4)
    whole.train()
    other.train(Position(epoch=1, batch=2, update=2))
    assert all(torch.equal(whole.weights()[name], tensor) for name, tensor in other.weights().items())


@pytest.mark.parametrize(
    ("launched", "head"),
    [
        (
            "/v/python /v/bin/accelerate launch --config_file fsdp2.yaml train.py --seed 1",
            "accelerate launch --config_file fsdp2.yaml",
        ),
        ("/v/python /v/bin/torchrun --nnodes 2 --node_rank 0 train.py --x train.py", "torchrun --nnodes 2 --node_rank 0"),
        ("/v/python -m torch.distributed.run --nproc_per_node 2 train.py", "python -m torch.distributed.run --nproc_per_node 2"),
        ("/v/python /v/bin/accelerate launch other.py", ""),
        ("bash run.sh train.py", ""),
    ],
)
def test_the_words_of_the_launcher_are_those_it_was_given(launched: str, head: str) -> None:
    assert words_before_script(launched.split(), "train.py") == head.split()


def test_the_command_that_continues_starts_as_this_one_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_DYNAMO_BACKEND", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launcher(1) == ["python"]
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launcher(1) == ["python"] and launcher(2) == ["torchrun", "--nproc_per_node", "2"]
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    assert launcher(1) == ["accelerate", "launch"] and launcher(2) == ["accelerate", "launch", "--num_processes", "2"]
    for name, value in {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    machines = "--num_machines 2 --machine_rank 0 --main_process_ip 10.0.0.1 --main_process_port 29500"
    assert launcher(4) == ["accelerate", "launch", *machines.split(), "--num_processes", "4"]
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    monkeypatch.setenv("LOCAL_RANK", "0")
    machines = "--nnodes 2 --node_rank 0 --master_addr 10.0.0.1 --master_port 29500"
    assert launcher(4) == ["torchrun", *machines.split(), "--nproc_per_node", "2"]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    words = "train.py --resume old --resume_from_huggingface --seed 1 --resume=older --huggingface_token hf_x --wandb_api=secret"
    monkeypatch.setattr("sys.argv", words.split())
    assert resume_command(SdxlTrainOptions, "new", 1) == ["python", "train.py", "--seed", "1", "--resume", "new"]
    assert secrets_given(SdxlTrainOptions) == ["--wandb_api_key", "--huggingface_token"]
