"""A model family too small to be real, and a run of the real loop over it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.dataset.batch import Batch
from library.diffusion.objective import DdpmObjective
from library.diffusion.schedule import NoiseSchedule
from library.models.family import SizeConditioning, TextCond, Tokens
from library.optim.optimizers import make_optimizer
from library.optim.updates import make_updater
from library.options.groups.loss import LossOptions
from library.options.groups.noise import NoiseOptions
from library.options.groups.optimizer import OptimizerOptions
from library.training.interrupt import StopRequest
from library.training.loop import TrainingRun, train
from library.training.position import Position
from library.training.state import Resumable
from library.training.step import ModelParts, TrainStep
from library.training.trainable import NetworkTrainable

SEED = 7


class FakeFamily:
    """Two text encoders, four latent channels, no files."""

    name = "fake"
    latent_channels = 4
    latent_stride = 8
    encoder_names = ("te1", "te2")

    def to_model_units(self, latents: Tensor) -> Tensor:
        return latents * 0.5

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        return {"ids": torch.tensor([[len(text) % 16] for text in texts])}

    def encode_text(self, tokens: Tokens, encoders: Sequence[nn.Module | None]) -> TextCond:
        return {f"hidden{n}": encoder(tokens["ids"]).mean(1) for n, encoder in enumerate(encoders) if encoder is not None}

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, cond: TextCond, sizes: SizeConditioning | None
    ) -> Tensor:
        text = torch.stack(list(cond.values())).sum(0)
        return denoiser(noisy) + text[:, :, None, None] + timesteps[:, None, None, None] / 1000


class FakeNetwork(nn.Module):
    """One adapter on the denoiser's first layer and one on the first encoder, with dropout, which the seed must decide."""

    def __init__(self, denoiser: nn.Sequential, encoder: nn.Embedding) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 2, 1, bias=False), nn.Conv2d(2, 4, 1, bias=False)
        self.text = nn.Parameter(torch.zeros(4))
        self.dropout = nn.Dropout(0.25)
        self.multiplier = 1.0
        original, encode = denoiser[0].forward, encoder.forward
        denoiser[0].forward = lambda x: original(x) + self.multiplier * self.up(self.dropout(self.down(x)))
        encoder.forward = lambda ids: encode(ids) + self.multiplier * self.text

    def set_multiplier(self, multiplier: float) -> None:
        self.multiplier = multiplier

    def on_epoch_start(self, text_encoders: Any, denoiser: Any) -> None:
        self.train()

    def save_weights(self, path: str, dtype: Any, metadata: Any) -> None:
        torch.save((self.state_dict(), metadata), path)


def dataset(count: int = 5, batch_size: int = 1) -> list[Batch]:
    """Make one epoch of images, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(count, 4, 8, 8, generator=generator)
    return [_batch(latents[i : i + batch_size], range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]


def _batch(latents: Tensor, numbers: Sequence[int]) -> Batch:
    sizes = torch.full((len(numbers), 2), 64)
    return Batch(
        images=None,
        latents=latents,
        captions=[f"image {n}" * n for n in numbers],
        text_cond=None,
        sizes=SizeConditioning(sizes, sizes, sizes),
        loss_weights=torch.ones(len(numbers)),
        draw_seeds=[1000 + n for n in numbers],
        image_keys=[],
    )


class FakeRun:
    """Everything a loop needs over the fake family, built the same way every time."""

    def __init__(
        self,
        batches: list[Batch],
        *,
        updates: int,
        accumulation: int = 1,
        observers: Sequence[Any] = (),
        lr: float = 0.1,
        optimizer_type: str = "AdamW",
    ) -> None:
        torch.manual_seed(0)
        denoiser = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)).requires_grad_(False)
        encoders = [nn.Embedding(16, 4).requires_grad_(False) for _ in range(2)]
        self.network = FakeNetwork(denoiser, encoders[0])
        objective = DdpmObjective(NoiseSchedule.make(), False, NoiseOptions(), LossOptions())
        self.trainable = NetworkTrainable(self.network, denoiser, encoders, None)
        parts = ModelParts(FakeFamily(), denoiser, list(encoders), None)
        step = TrainStep(self.network, parts, objective, train_text=True, set_strength=self.trainable.set_strength)
        options = OptimizerOptions(optimizer_type=optimizer_type, learning_rate=lr)
        self.optimizer = optimizer = make_optimizer(options, [{"params": self.network.parameters()}])
        self.accelerator = Accelerator(cpu=True)
        self.losses: list[float] = []
        step, optimizer = self.accelerator.prepare(step, optimizer)
        parameters = list(self.network.parameters())
        updater = make_updater(optimizer.optimizer, optimizer, parameters, options, self.accelerator)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer.optimizer, 1.0, 0.1, total_iters=20)
        self.run = TrainingRun(
            self.accelerator, step, self.trainable, updater, schedule,
            lambda epoch, start: self._batches(batches, epoch, start), len(batches), accumulation, updates, SEED,
            lambda loss: self.losses.append(loss.item()), list(observers),
        )  # fmt: skip
        self.live = Resumable(self.network, optimizer, schedule, None)

    @staticmethod
    def _batches(batches: list[Batch], epoch: int, start: int) -> Iterable[Batch]:
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(epoch)).tolist()
        return [batches[i] for i in order[start:]]

    def train(self, start: Position | None = None, stop: StopRequest | None = None) -> Position:
        return train(self.run, start or Position(), stop or StopRequest())

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.network.state_dict().items()}


class Recorder:
    """An observer that writes down what it was told, and may act."""

    def __init__(self, on_update: Any = None) -> None:
        self.events: list[tuple[str, Position]] = []
        self.on_update = on_update

    def before_training(self, position: Position) -> None:
        self.events.append(("before", position))

    def after_update(self, position: Position) -> None:
        self.events.append(("update", position))
        if self.on_update is not None:
            self.on_update(position)

    def after_epoch(self, position: Position) -> None:
        self.events.append(("epoch", position))

    def after_training(self, position: Position) -> None:
        self.events.append(("end", position))


def state_folder(root: Path) -> Path:
    return root / "run-step00000003-state"
