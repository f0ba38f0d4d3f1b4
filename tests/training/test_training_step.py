from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from library.diffusion.posterior import posterior_noise
from library.training.position import Position
from library.training.step import ModelParts, NanWatch, TrainStep
from tests.training.fake_run import FakeFamily, FakeRun, dataset


class FakeVae(nn.Module):
    """Counts its calls; makes one NaN where the image is very bright."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_sizes: list[int] = []


class EncodingFamily(FakeFamily):
    def encode_images(self, vae: FakeVae, images: Tensor, noise: Tensor) -> Tensor:
        vae.batch_sizes.append(len(images))
        latents = nn.functional.avg_pool2d(images, 8).mean(1, keepdim=True) + noise
        return torch.where(images.amax(dim=(1, 2, 3), keepdim=True) > 1, torch.nan, latents)


@pytest.fixture
def step() -> TrainStep:
    step = FakeRun(dataset(2, batch_size=2), updates=1).run.step
    parts = step.parts
    step.parts = ModelParts(EncodingFamily(), parts.denoiser, parts.text_encoders, FakeVae(), vae_batch_size=2)
    return step


def image_batch(count: int) -> object:
    batch = dataset(count, batch_size=count)[0]
    return replace(batch, latents=None, images=torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def test_images_are_encoded_a_few_at_a_time_with_noise_of_their_own_seed(step: TrainStep) -> None:
    batch = image_batch(3)
    latents = step.cached_or_encoded_latents(batch)
    assert step.parts.vae.batch_sizes == [2, 1]
    plain = nn.functional.avg_pool2d(batch.images, 8).mean(1, keepdim=True)
    torch.testing.assert_close(latents - plain, posterior_noise(batch.draw_seeds, (4, 8, 8)))
    alone = step.cached_or_encoded_latents(replace(batch, images=batch.images[1:2], draw_seeds=batch.draw_seeds[1:2]))
    torch.testing.assert_close(alone[0], latents[1])


def test_the_posterior_does_not_share_its_noise_with_the_noise_that_is_predicted(step: TrainStep) -> None:
    batch = dataset(1)[0]
    noise = step.objective.sample(batch.latents, batch.draw_seeds).noise
    posterior = posterior_noise(batch.draw_seeds, (4, 8, 8))
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), posterior.flatten()]))[0, 1]) < 0.2


def test_what_the_vae_made_not_a_number_is_zero_and_the_loss_is_finite(step: TrainStep) -> None:
    batch = image_batch(2)
    batch.images[0, 0, 0, 0] = 5.0
    assert not step.cached_or_encoded_latents(batch)[0].any()
    assert step(batch).isfinite().all()


def test_images_whose_latents_were_no_numbers_are_told_once(step: TrainStep, caplog: pytest.LogCaptureFixture) -> None:
    batch, watch = image_batch(2), NanWatch(step)
    watch.after_epoch(Position())
    assert not caplog.records
    batch.images[0, 0, 0, 0] = 5.0
    step(batch)
    watch.after_epoch(Position())
    watch.after_training(Position())
    assert [record.getMessage() for record in caplog.records if "of 1 images" in record.getMessage()] and len(caplog.records) == 1


def test_gradients_reach_the_encoders_adapters_only_when_text_is_trained(step: TrainStep) -> None:
    batch = dataset(2, batch_size=2)[0]
    for train_text in (True, False):
        step.train_text = train_text
        step.zero_grad(set_to_none=True)
        step(batch).mean().backward()
        assert (step.trained.text.grad is not None) is train_text
        assert step.trained.up.weight.grad.any()
