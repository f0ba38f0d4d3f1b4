"""Losses and gradients that are not finite: what stays of the weights, what is told, and how a run goes on."""

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.dataset.batch import Batch
from library.optim.finite import FiniteGate
from library.optim.parameter_steps import ParameterSteps
from library.optim.updates import UpdateInBackward
from library.options.scripts import SdxlTrainNetworkOptions
from library.training.ema import MovingAverage
from library.training.logs import LossRecorder
from library.training.non_finite import MOST_IN_A_ROW, FiniteGuard, Spoiled
from library.training.position import Position
from library.training.trouble import NotFiniteError, add_guard, advice
from tests.training.fake_run import FakeRun, Recorder, dataset
from tests.training.test_training_saving import make_saver


def named(batches: list[Batch]) -> list[Batch]:
    return [replace(batch, image_keys=[f"banana{number}.png"]) for number, batch in enumerate(batches)]


def spoiled(number: int) -> list[Batch]:
    """One epoch of images of which one has a value that is not a number."""
    batches = named(dataset(5))
    latents = batches[number].latents.clone()
    latents[0, 0, 0, 0] = torch.nan
    batches[number] = replace(batches[number], latents=latents)
    return batches


def guarded(run: FakeRun, folder: Path, action: str, recorder: Recorder | None = None) -> FakeRun:
    options = SdxlTrainNetworkOptions()
    optimizer = options.optimizer.model_copy(update={"on_non_finite": action})
    setting = SimpleNamespace(
        options=replace(options, optimizer=optimizer),
        accelerator=SimpleNamespace(device=torch.device("cpu"), scaler=None, num_processes=1),
        dtypes=SimpleNamespace(compute=torch.bfloat16, trained=torch.float32, vae=torch.bfloat16),
    )
    saver = make_saver(run, folder, save_every_n_steps=1000)
    run.run.observers = [recorder or Recorder(), saver]
    add_guard(run.run, saver, setting, SimpleNamespace(is_divided=False), run.optimizer)
    return run


def in_backward(run: FakeRun) -> FakeRun:
    run.run.updater = UpdateInBackward(ParameterSteps(run.optimizer), [[p] for p in run.network.parameters()], 0.0)
    return run


@pytest.mark.parametrize(("how", "accumulation"), [(lambda run: run, 1), (lambda run: run, 2), (in_backward, 1)])
def test_the_last_good_weights_are_saved_and_nothing_of_the_bad_update_is_in_them(
    tmp_path: Path, how: Callable[[FakeRun], FakeRun], accumulation: int
) -> None:
    bad = FakeRun._batches(list(range(5)), 1, 0)[3]  # the fourth batch that is trained on
    recorder = Recorder()
    run = guarded(how(FakeRun(spoiled(bad), updates=20, accumulation=accumulation)), tmp_path, "stop", recorder)
    with pytest.raises(NotFiniteError) as told:
        run.train()
    good = 3 // accumulation
    whole = how(FakeRun(named(dataset(5)), updates=good, accumulation=accumulation))
    whole.train()
    assert all(torch.equal(run.weights()[name], tensor) for name, tensor in whole.weights().items())
    assert run.run.schedule.state_dict()["last_epoch"] == good
    assert [position.update for event, position in recorder.events if event == "update"] == list(range(1, good + 1))
    text = str(told.value)
    assert f"The loss of step {good + 1} is not finite." in text
    assert f"image: banana{bad}.png (timestep" in text and "loss nan)" in text and "image: banana" in text
    assert text.count("  image: ") == 1
    assert "network: down (Conv2d, output float32, weights float32, its input was not finite either)" in text
    assert "types: computation bfloat16, trained weights float32, VAE bfloat16" in text
    state = tmp_path / f"net-step0000000{good}-state"
    assert state.is_dir() and f"--resume {state}" in text


def test_the_moving_average_forgets_the_updates_that_a_gpu_is_ahead(tmp_path: Path) -> None:
    bad = FakeRun._batches(list(range(5)), 1, 0)[3]
    averages = []
    for batches, updates in ((named(dataset(5)), 3), (spoiled(bad), 20)):
        run = guarded(FakeRun(batches, updates=updates), tmp_path, "stop")
        run.live.extras["ema"] = average = MovingAverage(run.network, 0.9, in_main_memory=True)
        run.run.guard._lag = 2
        run.run.observers = [*run.run.observers, average]
        averages.append(average)
        with pytest.raises(NotFiniteError) if updates == 20 else nullcontext():
            run.train()
    whole, stopped = (average.state_dict() for average in averages)
    for name, tensor in whole.items():
        torch.testing.assert_close(stopped[name], tensor, rtol=1e-6, atol=1e-8)
        assert torch.equal(load_file(tmp_path / "net-step00000003-state/extras/ema.safetensors")[name], stopped[name])


def test_what_is_saved_already_is_not_written_again(tmp_path: Path) -> None:
    bad = FakeRun._batches(list(range(5)), 1, 0)[3]
    (tmp_path / "net-step00000003-state").mkdir()
    with pytest.raises(NotFiniteError, match="net-step00000003-state"):
        guarded(FakeRun(spoiled(bad), updates=20), tmp_path, "stop").train()
    assert not any((tmp_path / "net-step00000003-state").iterdir())


def test_skipped_updates_change_nothing_and_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = FakeRun._batches(list(range(5)), 1, 0)[0]
    before = FakeRun(spoiled(bad), updates=1)
    initial = before.weights()
    run = guarded(before, tmp_path, "skip")
    with caplog.at_level(logging.WARNING):
        run.train()
    assert all(torch.equal(run.weights()[name], tensor) for name, tensor in initial.items())
    assert "The loss of step 1 is not finite. That update was left out; training goes on." in caplog.text
    caplog.clear()
    long = guarded(FakeRun(spoiled(bad), updates=30), tmp_path, "skip")
    long.run.guard._lag = 2
    seen: list[tuple[str, int]] = []
    computed: Counter[int] = Counter()

    def observe(batch: Batch, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        line = f"{batch.image_keys[0]} (timestep {timesteps.item():g}, loss {losses.item():.4g})"
        seen.append((line, torch.initial_seed()))

    long.accelerator.unwrap_model(long.run.step).observe = observe
    long.trainable.denoiser.register_forward_pre_hook(lambda *_: computed.update([torch.initial_seed()]))
    with caplog.at_level(logging.WARNING):
        long.train()
    assert len(seen) == 30, "what is run again is not told to who looks on, and goes on being told afterwards"
    left_out = [(line, seed) for line, seed in seen if "loss nan" in line]
    assert (
        len(left_out) == 6 and caplog.text.count("  image: ") == caplog.text.count("Of later ones only the step is told.") * 3 == 3
    )
    assert all(f"image: {line}" in caplog.text for line, _ in left_out[:3])
    assert [seed for seed, count in computed.items() if count == 2] == [seed for _, seed in left_out[:3]], "with the same draws"
    assert all(torch.isfinite(tensor).all() for tensor in long.weights().values())
    assert any(not torch.equal(long.weights()[name], tensor) for name, tensor in initial.items())


def test_a_gradient_that_is_not_finite_is_found_where_the_loss_is(tmp_path: Path) -> None:
    run = guarded(FakeRun(named(dataset(5)), updates=20), tmp_path, "stop")
    calls: list[int] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * torch.inf if len(calls) > 2 else gradient

    run.network.up.weight.register_hook(spoil)
    with pytest.raises(NotFiniteError) as told:
        run.train()
    assert "The gradient of step 3 is not finite, though its loss is." in str(told.value)
    assert "not the gradient of up.weight" in str(told.value)
    assert all(torch.isfinite(tensor).all() for tensor in run.weights().values())


def test_weights_that_a_step_spoiled_are_not_called_good(tmp_path: Path) -> None:
    def spoil(position: Position) -> None:
        run.network.up.weight.data[0] = torch.inf

    run = guarded(FakeRun(named(dataset(5)), updates=20), tmp_path, "stop", Recorder(on_update=spoil))
    with pytest.raises(NotFiniteError, match=r"themselves are not finite any more \(up\.weight\)") as told:
        run.train()
    assert "network: up (Conv2d, output float32, weights float32, its weights are not finite)" in str(told.value)
    assert not list(tmp_path.iterdir())


def judged(
    *, stops: bool, made: bool, is_finite: bool, updates: int, good: int = 0, lag: int = 0, saved_at: int = 0
) -> tuple[list[int], list[int]]:
    """Return the steps that were told, and those that ended a run with scaled gradients.

    Args:
        stops: see `FiniteGuard`.
        made: whether updates were made, but for overflows.
        is_finite: whether losses were.
        updates: their number.
        good: number of the one that was made, with a loss that was finite.
        lag: updates that the device is behind.
        saved_at: number of the one after which something is saved.
    """
    told: list[int] = []
    ended: list[int] = []
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    gate = FiniteGate(optimizer, stays_shut=stops)

    def end(spoiled: Spoiled, last_good: Position) -> None:
        ended.append(spoiled.before.update + 1)

    guard = FiniteGuard(
        gate, torch.optim.lr_scheduler.LinearLR(optimizer), lambda: optimizer.param_groups, torch.device("cpu"), stops=stops,
        scales=True, must_know=lambda position: position.update == saved_at,
        tell=lambda spoiled: told.append(spoiled.before.update + 1), end=end,
    )  # fmt: skip
    guard._lag = lag
    batch: Any = None
    for update in range(updates):
        is_good = update + 1 == good
        guard.begin_batch(batch, 1, update, torch.tensor(1.0 if is_finite or is_good else torch.nan))
        guard.finish_update(made or is_good)
        guard.after_update(Position(1, update + 1, update + 1))
    return told, ended


def test_gradients_may_overflow_in_float16_but_not_forever_and_losses_may_not() -> None:
    assert judged(stops=True, made=False, is_finite=True, updates=MOST_IN_A_ROW - 1) == ([], [])
    assert judged(stops=True, made=False, is_finite=True, updates=MOST_IN_A_ROW) == ([], [MOST_IN_A_ROW])
    assert judged(stops=True, made=False, is_finite=False, updates=1) == ([], [1])
    assert judged(stops=True, made=False, is_finite=True, updates=2 * MOST_IN_A_ROW - 1, good=MOST_IN_A_ROW) == ([], [])
    told, ended = judged(stops=False, made=False, is_finite=False, updates=MOST_IN_A_ROW)
    assert told == list(range(1, MOST_IN_A_ROW)) and ended == [MOST_IN_A_ROW]


def test_updates_are_judged_when_the_device_had_time_and_before_something_is_saved() -> None:
    assert judged(stops=False, made=True, is_finite=False, updates=5, lag=2) == ([1, 2, 3], [])
    assert judged(stops=False, made=True, is_finite=False, updates=5, lag=2, saved_at=5) == ([1, 2, 3, 4, 5], [])


def test_the_average_loss_takes_no_part_in_it() -> None:
    recorder = LossRecorder()
    for epoch in (1, 2):
        for index, loss in enumerate([1.0, torch.nan if epoch == 1 else 3.0, 2.0]):
            recorder.add(epoch, index, loss)
        assert recorder.average == (1.5 if epoch == 1 else 2.0)


def test_only_what_was_not_tried_is_advised() -> None:
    options = SdxlTrainNetworkOptions()
    assert not any("no_half_vae" in line or "max_grad_norm" in line for line in advice(options))
    half = options.precision.model_copy(update={"mixed_precision": "fp16"})
    assert any("bf16" in line for line in advice(replace(options, precision=half)))
    assert not any("bias_correction" in line for line in advice(options))
    for given, is_advised in (([], True), (["use_bias_correction=True"], False)):
        prodigy = options.optimizer.model_copy(update={"optimizer_type": "prodigy", "optimizer_args": given})
        assert any("use_bias_correction=True" in line for line in advice(replace(options, optimizer=prodigy))) == is_advised
    unlimited = options.optimizer.model_copy(update={"max_grad_norm": 0})
    assert any("--max_grad_norm 1" in line for line in advice(replace(options, optimizer=unlimited)))
