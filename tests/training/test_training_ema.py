"""The moving average of the trained weights: what it is, what it leaves alone, how it is saved and taken up again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.training.ema import MovingAverage, decay_after
from library.training.position import Position
from library.training.state import load_state, save_state
from tests.training.fake_run import SEED, FakeRun, Recorder, dataset
from tests.training.test_training_saving import make_saver


class AveragedRun(FakeRun):
    """A run with an average, which remembers the weights after each update, the first ones included."""

    def __init__(self, decay: float, *, updates: int, folder: Path | None = None) -> None:
        super().__init__(dataset(5), updates=updates)
        self.average = MovingAverage(self.network, decay, in_main_memory=True)
        self.passed = [self.weights()]
        self.run.observers = [self.average, Recorder(lambda position: self.passed.append(self.weights()))]
        self.live.extras["ema"] = self.average
        if folder is not None:
            saver = make_saver(self, folder, save_every_n_steps=5, save_last_n_steps=5)
            saver.variants["-ema"] = self.average.in_place_of_weights
            self.run.observers.append(saver)


def expected_average(passed: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    average = {name: tensor.double() for name, tensor in passed[0].items()}
    for n, weights in enumerate(passed[1:], start=1):
        keep = min(decay, (1 + n) / (10 + n))
        average = {name: keep * average[name] + (1 - keep) * weights[name].double() for name in average}
    return average


@pytest.mark.parametrize("decay", [0.999, 0.25])
def test_it_is_the_exponential_average_with_a_decay_that_warms_up(decay: float) -> None:
    run = AveragedRun(decay, updates=8)
    run.train()
    found, expected = run.average.state_dict(), expected_average(run.passed, decay)
    assert found.keys() == expected.keys() == dict(run.network.named_parameters()).keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-8)
        assert not torch.allclose(tensor, run.passed[-1][name], rtol=1e-4)


def test_the_decay_grows_to_what_was_asked_for() -> None:
    assert [decay_after(n, 0.999) for n in (1, 8, 90)] == [2 / 11, 0.5, 0.91]
    assert decay_after(8989, 0.999) == pytest.approx(0.999) == decay_after(10**7, 0.999)
    assert decay_after(100, 0.5) == 0.5


def test_training_does_not_know_of_it_and_files_lie_beside_the_models(tmp_path: Path) -> None:
    run, plain = AveragedRun(0.9, updates=15, folder=tmp_path), FakeRun(dataset(5), updates=15)
    run.train()
    plain.train()
    assert all(torch.equal(tensor, run.weights()[name]) for name, tensor in plain.weights().items())
    models = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert models == {f"net{step}{kind}.pt" for step in ("-step00000010", "-step00000015", "") for kind in ("", "-ema")}
    (saved, metadata), average = torch.load(tmp_path / "net-ema.pt"), run.average.state_dict()
    assert metadata == {"stem": "net-ema"}
    assert all(torch.equal(saved[name], tensor) for name, tensor in average.items())


def test_a_state_holds_it_so_that_resuming_is_exact(tmp_path: Path) -> None:
    whole, first, second = (AveragedRun(0.9, updates=updates) for updates in (7, 3, 7))
    whole.train()
    end = first.train()
    save_state(tmp_path / "state", first.live, end, SEED, 5, {})
    load_state(tmp_path / "state", second.live)
    second.train(end)
    assert (tmp_path / "state" / "extras" / "ema.safetensors").is_file()
    for name, tensor in whole.average.state_dict().items():
        assert torch.equal(second.average.state_dict()[name], tensor)


@pytest.mark.parametrize("saved_as", [None, torch.float32, torch.bfloat16])
def test_bfloat16_weights_have_a_float32_average_that_is_rounded_once(saved_as: torch.dtype | None) -> None:
    module = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    before = module.weight.data
    average = MovingAverage(module, 0.5, in_main_memory=False)
    with torch.no_grad():
        module.weight += 0.01
    average.after_update(Position(update=100))
    expected = average.state_dict()["weight"]
    assert expected.dtype == torch.float32 and not torch.equal(expected, expected.bfloat16().float())
    with average.in_place_of_weights(saved_as):
        held = module.weight.detach().clone()
    assert torch.equal(held, expected if saved_as else expected.bfloat16())
    assert module.weight.dtype == torch.bfloat16
    assert module.weight.data_ptr() == before.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("in_main_memory", [False, True])
def test_an_update_of_the_average_never_waits_for_the_device(in_main_memory: bool) -> None:
    module = torch.nn.Linear(64, 64, device="cuda")
    average = MovingAverage(module, 0.5, in_main_memory=in_main_memory)
    passed = [{name: tensor.detach().cpu() for name, tensor in module.named_parameters()}]
    for update in range(1, 6):
        with torch.no_grad():
            module.weight.add_(0.1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            average.after_update(Position(update=update))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        passed.append({name: tensor.detach().cpu() for name, tensor in module.named_parameters()})
    for name, expected in expected_average(passed, 0.5).items():
        torch.testing.assert_close(average.state_dict()[name].cpu().double(), expected, rtol=1e-5, atol=1e-7)
