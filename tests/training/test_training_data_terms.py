"""What the dataset adds to the loss: masks, images that preserve the model, and how strongly a network acts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from library.dataset.batch import Batch
from library.diffusion.objective import DdpmObjective
from library.diffusion.schedule import NoiseSchedule
from library.options.dataset_config import DatasetConfig
from library.options.errors import UsageError
from library.options.groups.loss import LossOptions
from library.options.groups.noise import NoiseOptions
from library.training.data_terms import check_data_terms, describe_data_terms, needs_strength, unread_attributes
from library.training.step import TrainStep
from tests.dataset.dataset_samples import config, section, subset
from tests.training.fake_run import FakeFamily, FakeRun, dataset


class CheckpointedFamily(FakeFamily):
    def predict(self, *arguments: Any) -> Any:
        return checkpoint(super().predict, *arguments, use_reentrant=False)


PRESERVED = {"diff_output_preservation": True}


@pytest.fixture
def run() -> FakeRun:
    made = FakeRun(dataset(3, batch_size=3), updates=1)
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(4))
    made.network.dropout.p = 0.0
    return made


def batch(**changes: Any) -> Batch:
    return replace(dataset(3, batch_size=3)[0], **changes)


def elements(step: TrainStep, batch: Batch) -> Tensor:
    """The unreduced L2 loss of a batch, in float64."""
    latents = step.parts.family.to_model_units(batch.latents)
    sample = step.objective.sample(latents, batch.draw_seeds)
    with torch.no_grad():
        prediction = step.parts.family.predict(
            step.parts.denoiser, sample.noisy, sample.timesteps, step.conditioning(batch), batch.sizes
        )
    return (prediction.double() - sample.noise.double()) ** 2


def random_masks() -> Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(8))


def averaged(masks: Tensor) -> Tensor:
    return masks.double().view(-1, 1, 8, 8, 8, 8).mean((3, 5))


def test_the_alpha_channel_weighs_the_loss_whether_or_not_masked_loss_is_given(run: FakeRun) -> None:
    masks = random_masks()
    expected = (elements(run.run.step, batch()) * averaged(masks)).mean((1, 2, 3))
    for masked_loss in (False, True):
        run.run.step.masks_from_control = masked_loss
        torch.testing.assert_close(run.run.step(batch(masks=masks)).double(), expected, rtol=1e-5, atol=0)


def test_each_image_counts_by_its_weight(run: FakeRun) -> None:
    weights = torch.tensor([1.0, 0.0, 0.25])
    torch.testing.assert_close(run.run.step(batch(loss_weights=weights)), run.run.step(batch()) * weights)


def test_the_red_of_the_control_image_wins_over_the_alpha_channel_with_masked_loss_only(run: FakeRun) -> None:
    masks, red = random_masks(), random_masks().flip(-1)
    control = torch.stack([2 * red - 1, torch.zeros_like(red), torch.ones_like(red)], dim=1)
    both = batch(masks=masks, conditioning=control)
    whole = elements(run.run.step, batch())
    run.run.step.masks_from_control = True
    torch.testing.assert_close(run.run.step(both).double(), (whole * averaged(red)).mean((1, 2, 3)), rtol=1e-5, atol=0)
    run.run.step.masks_from_control = False  # as in training of a ControlNet, where it is no mask
    torch.testing.assert_close(run.run.step(both).double(), (whole * averaged(masks)).mean((1, 2, 3)), rtol=1e-5, atol=0)
    alone = run.run.step(batch(conditioning=control)).double()
    torch.testing.assert_close(alone, whole.mean((1, 2, 3)), rtol=1e-5, atol=0)


def test_a_normalised_mask_gives_the_mean_over_what_it_shows(run: FakeRun) -> None:
    options = LossOptions(masked_loss_normalize=True)
    run.run.step.objective = DdpmObjective(NoiseSchedule.make(), False, NoiseOptions(), options)
    masks = random_masks()
    weights = averaged(masks)
    expected = (elements(run.run.step, batch()) * weights).sum((1, 2, 3)) / (4 * weights.sum((1, 2, 3)))
    torch.testing.assert_close(run.run.step(batch(masks=masks)).double(), expected, rtol=1e-5, atol=0)


def predictions(run: FakeRun, batch: Batch, strength: float) -> Tensor:
    """What the model predicts with the network at a strength, text encoders included."""
    step = run.run.step
    run.network.set_multiplier(strength)
    latents = step.parts.family.to_model_units(batch.latents)
    sample = step.objective.sample(latents, batch.draw_seeds)
    cond = step.conditioning(batch)
    prediction = step.parts.family.predict(step.parts.denoiser, sample.noisy, sample.timesteps, cond, batch.sizes)
    run.network.set_multiplier(1.0)
    return prediction


def test_images_that_preserve_the_model_are_held_to_its_prediction_without_the_network(run: FakeRun) -> None:
    mixed = batch(custom_attributes=[{}, PRESERVED, {"diff_output_preservation": False}])
    found = run.run.step(mixed)
    found.mean().backward()
    gradients = [parameter.grad.clone() for parameter in run.network.parameters()]
    run.network.zero_grad()

    target = run.run.step.objective.sample(mixed.latents * 0.5, mixed.draw_seeds).noise.clone()
    target[1] = predictions(run, mixed, 0.0)[1].detach()
    expected = ((predictions(run, mixed, 1.0) - target) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(found, expected)
    assert not torch.isclose(found[1], run.run.step(batch())[1])
    expected.mean().backward()
    for parameter, gradient in zip(run.network.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_a_network_that_changes_nothing_preserves_perfectly(run: FakeRun) -> None:
    with torch.no_grad():
        run.network.up.weight.zero_()
        run.network.text.zero_()
    assert run.run.step(batch(custom_attributes=[PRESERVED] * 3)).tolist() == [0.0, 0.0, 0.0]


def test_preserving_takes_no_gradient_away_under_autocast(run: FakeRun) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run.run.step(batch(custom_attributes=[PRESERVED, {}, {}])).mean()
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in run.network.parameters())


def test_a_dataset_sets_the_strength_of_the_network(run: FakeRun) -> None:
    strong = batch(network_multiplier=2.0)
    target = run.run.step.objective.sample(strong.latents * 0.5, strong.draw_seeds).noise
    expected = ((predictions(run, strong, 2.0) - target) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(run.run.step(strong), expected)
    assert not torch.allclose(run.run.step(batch()), expected)


def test_the_strength_lasts_until_checkpointed_parts_ran_again(run: FakeRun) -> None:
    gradients = []
    for checkpointed in (False, True):
        run.run.step.parts = replace(run.run.step.parts, family=CheckpointedFamily() if checkpointed else FakeFamily())
        run.network.zero_grad()
        loss = run.run.step(batch(network_multiplier=3.0, custom_attributes=[PRESERVED, {}, {}])).mean()
        assert run.network.multiplier == 3.0  # not yet put back
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in run.network.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_pictures_are_drawn_and_files_saved_at_full_strength(run: FakeRun) -> None:
    run.run.step(batch(network_multiplier=2.0))
    assert run.network.multiplier == 2.0
    with run.trainable.evaluation():
        assert run.network.multiplier == 1.0
    assert run.network.multiplier == 2.0
    run.run.step(batch())
    assert run.network.multiplier == 1.0


def problems(data: DatasetConfig, *, trains_network: bool, **loss: Any) -> str:
    with pytest.raises(UsageError) as caught:
        check_data_terms(data, LossOptions(**loss), trains_network=trains_network)
    return "\n".join(caught.value.problems)


def test_what_is_for_networks_is_refused_where_a_model_is_trained() -> None:
    data = config(section(subset("a"), network_multiplier=0.5), section(subset("b", custom_attributes=PRESERVED)))
    told = problems(data, trains_network=False)
    assert "network_multiplier of the dataset with a is 0.5, but this script trains no network" in told
    assert "diff_output_preservation of b holds images to what the model predicts without the network" in told
    check_data_terms(data, LossOptions(), trains_network=True)
    check_data_terms(config(section(subset("a", custom_attributes={"x": 1}))), LossOptions(), trains_network=False)


def test_a_strength_of_0_is_refused() -> None:
    assert "nothing would be learned from it" in problems(config(section(subset("a"), network_multiplier=0)), trains_network=True)


def test_normalising_without_masks_is_refused() -> None:
    told = problems(config(section(subset("a"))), trains_network=True, masked_loss_normalize=True)
    assert "--masked_loss_normalize has no masks" in told
    with_alpha = config(section(subset("a", alpha_mask=True)))
    check_data_terms(with_alpha, LossOptions(masked_loss_normalize=True), trains_network=True)


def test_attributes_that_nothing_reads_are_told() -> None:
    data = config(
        section(subset("a", custom_attributes={"diff_output_preservaton": True}), subset("b", custom_attributes=PRESERVED))
    )
    told = unread_attributes(data)
    assert told is not None
    assert told.startswith("Nothing here reads the custom_attributes diff_output_preservaton;")
    assert told.endswith("Did you mean diff_output_preservation?")
    assert unread_attributes(config(section(subset("a", custom_attributes=PRESERVED)))) is None


def test_the_head_of_a_run_names_what_the_dataset_adds() -> None:
    masked = subset("masked", conditioning_data_dir="masks", alpha_mask=True)
    data = config(section(masked, subset("reg", custom_attributes=PRESERVED, alpha_mask=True), network_multiplier=0.5))
    assert describe_data_terms(data, LossOptions(masked_loss=True)) == [
        "masked by control images (masked)",
        "masked by alpha channels (reg)",
        "held to the model without the network: reg",
        "network strength 0.5 for one dataset or more",
    ]
    assert describe_data_terms(config(section(subset("a"))), LossOptions()) == []
    assert needs_strength(data)
    assert not needs_strength(config(section(subset("a"))))
