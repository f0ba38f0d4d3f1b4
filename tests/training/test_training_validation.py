"""The loss on held-out images: what it is, when it is measured, and that it changes nothing else."""

import contextlib
import functools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from library.dataset.batch import Batch
from library.optim.eval_mode import averaged_weights
from library.options.groups.validation import ValidationOptions
from library.training.position import Position
from library.training.trackers import RunLog
from library.training.validation import Validation, ValidationPlan, measuring_seed, validation_timesteps
from tests.training.fake_run import FakeRun, dataset

NEVER = ValidationPlan(None, 10**9)


class Seen:
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.values: list[tuple[dict[str, float], int]] = []

    def scalars(self, values: Any, step: int, fields: Any) -> None:
        self.values.append((dict(values), step))

    def image(self, name: str, image: Any, caption: str) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


def held_out(count: int = 3, batch_size: int = 1) -> list[Batch]:
    batches = dataset(count, batch_size=batch_size)
    keys = iter(range(count))
    return [replace(batch, image_keys=[f"{next(keys)}.png" for _ in batch.captions]) for batch in batches]


def observer(run: FakeRun, plan: ValidationPlan = NEVER, batches: list[Batch] | None = None, **changes: Any) -> Validation:
    own = held_out() if batches is None else batches
    values: dict[str, Any] = {
        "plan": plan, "batches": lambda: own, "step": run.run.step, "timesteps": [200, 400, 600, 800], "seed": 5,
        "accelerator": run.accelerator, "trainable": run.trainable, "averaged": contextlib.nullcontext,
        "training_loss": lambda: 0.25, "trackers": RunLog(),
    }  # fmt: skip
    return Validation(**(values | changes))


def fresh() -> FakeRun:
    return FakeRun(dataset(5), updates=6)


def test_the_loss_is_the_mean_over_images_and_timesteps_with_noise_of_their_own() -> None:
    run = fresh()
    run.network.eval()
    step, total = run.run.step, 0.0
    for batch in held_out():
        for timestep in (200, 400, 600, 800):
            latents = step.parts.family.to_model_units(batch.latents)
            sample = step.objective.sample(latents, [measuring_seed(5, batch.image_keys[0], timestep)], timestep)
            assert sample.timesteps.tolist() == [timestep]
            with torch.no_grad():
                prediction = step.parts.family.predict(
                    step.parts.denoiser, sample.noisy, sample.timesteps, step.conditioning(batch), batch.sizes
                )
            total += ((prediction - sample.noise).double() ** 2).mean().item()
    assert observer(run).measure().loss == pytest.approx(total / 12, rel=1e-6)


def test_two_measurements_are_equal_to_the_bit_whatever_happened_between(monkeypatch: pytest.MonkeyPatch) -> None:
    run = fresh()
    validation = observer(run)
    first = validation.measure().loss
    torch.manual_seed(99)
    random.seed(99)
    run.network.train()
    assert validation.measure().loss == first
    assert observer(run, seed=6).measure().loss != first


def test_images_weigh_the_same_in_batches_of_any_size() -> None:
    run = fresh()
    one, two = observer(run, batches=held_out(3, 1)).measure().loss, observer(run, batches=held_out(3, 2)).measure().loss
    assert one == pytest.approx(two, rel=1e-6)


@pytest.mark.parametrize("name", ["AdamW", "AdamWScheduleFree"])
def test_training_ends_with_the_same_bits_whether_or_not_the_loss_is_measured(name: str) -> None:
    ends = []
    for plan in (ValidationPlan(1, 1), NEVER):
        run = FakeRun(dataset(5), updates=6, optimizer_type=name)
        seen = Seen()
        averaged = functools.partial(averaged_weights, run.optimizer)
        run.run.observers = [observer(run, plan, averaged=averaged, trackers=RunLog([seen]))]
        if hasattr(run.optimizer, "train"):
            run.optimizer.train()
        run.train()
        assert len(seen.values) == (7 if plan.every_n_steps else 0)
        ends.append((run.weights(), run.losses))
    (measured, losses), (unmeasured, other_losses) = ends
    assert losses == other_losses
    assert all(torch.equal(measured[name], unmeasured[name]) for name in measured)


def test_the_averaged_weights_are_measured_where_there_are_any() -> None:
    run = FakeRun(dataset(5), updates=6, optimizer_type="AdamWScheduleFree")
    run.optimizer.train()
    run.train()
    trained = observer(run).measure().loss
    averaged = observer(run, averaged=functools.partial(averaged_weights, run.optimizer)).measure().loss
    run.optimizer.eval()
    assert averaged == observer(run).measure().loss != trained


def test_random_numbers_and_modes_are_left_as_they_were() -> None:
    run = fresh()
    run.network.train()
    run.network.dropout.eval()  # a part in another mode than the whole
    encoder = run.run.step.parts.text_encoders[0]
    encoder.train()
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(3), random.random()
    torch.manual_seed(3)
    random.seed(3)

    def batches() -> list[Batch]:
        torch.rand(5), random.random()
        assert not run.network.training
        assert not encoder.training
        return held_out()

    validation = observer(run)
    validation.batches = batches
    validation.measure()
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert run.network.training
    assert not run.network.dropout.training
    assert encoder.training


def test_the_values_go_to_the_trackers_under_the_names_of_sd_scripts() -> None:
    run, seen = fresh(), Seen()
    run.run.observers = [observer(run, ValidationPlan(2, 1), trackers=RunLog([seen]))]
    run.train()
    names = [(sorted(values), step) for values, step in seen.values]
    step = ["loss/validation/step_average", "loss/validation/step_divergence"]
    epoch = ["loss/validation/epoch_average", "loss/validation/epoch_divergence"]
    assert names == [(step, 2), (step, 4), (epoch, 1), (step, 6)]
    for values, _ in seen.values:
        average, divergence = values.values()
        assert divergence == pytest.approx(average - 0.25)
    assert seen.values[0][0]["loss/validation/step_average"] != seen.values[1][0]["loss/validation/step_average"]


def test_each_dataset_has_a_value_of_its_own_and_all_together_weigh_by_images() -> None:
    run, seen = fresh(), Seen()
    batches = [replace(batch, section=2 if number == 1 else 0) for number, batch in enumerate(held_out(3))]
    validation = observer(run, ValidationPlan(None, 1), batches=batches, trackers=RunLog([seen]), num_datasets=3)
    alone = [observer(run, batches=[batch]).measure().loss for batch in held_out(3)]
    validation.after_epoch(Position(epoch=1, update=5))
    ((values, _),) = seen.values
    assert values["loss/validation/dataset1/epoch_average"] == pytest.approx((alone[0] + alone[2]) / 2)
    assert values["loss/validation/dataset3/epoch_average"] == pytest.approx(alone[1])
    assert values["loss/validation/epoch_average"] == pytest.approx(sum(alone) / 3)
    assert len(values) == 4
    assert observer(run, batches=batches[:1], num_datasets=3).measure().by_dataset() == {}


def test_a_place_that_is_both_step_and_epoch_is_measured_once() -> None:
    run, calls = fresh(), []
    validation = observer(run, ValidationPlan(5, 1))
    validation.batches = lambda: calls.append(1) or held_out()  # type: ignore[func-returns-value]
    run.run.observers = [validation]
    run.train()
    assert len(calls) == 1


def test_epochs_are_measured_unless_a_number_of_them_is_given() -> None:
    every, second = ValidationPlan.of(ValidationOptions()), ValidationPlan.of(ValidationOptions(validate_every_n_epochs=2))
    assert [every.is_due_after_epoch(epoch) for epoch in (1, 2, 3)] == [True, True, True]
    assert [second.is_due_after_epoch(epoch) for epoch in (1, 2, 3)] == [False, True, False]
    assert not every.is_due_after_update(4)
    steps = ValidationPlan.of(ValidationOptions(validate_every_n_steps=3))
    assert [steps.is_due_after_update(update) for update in (1, 2, 3, 6)] == [False, False, True, True]


def test_no_held_out_image_in_this_process_gives_no_number_and_no_error() -> None:
    validation = observer(fresh(), batches=[])
    validation.after_epoch(Position(epoch=10**9))
    assert validation.measure().loss != validation.measure().loss  # not a number


def test_the_timesteps_are_those_of_sd_scripts(project_root: Path) -> None:
    table = json.loads((project_root / "tests/compat/training_reference_values.json").read_text())["validation"]["timesteps"]
    for bounds, expected in table.items():
        low, high = map(int, bounds.split("_"))
        assert validation_timesteps(low, high) == expected
    assert validation_timesteps(0, 1000) == [200, 400, 600, 800]
    assert validation_timesteps(7, 7) == [7]
