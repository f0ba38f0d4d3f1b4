"""Every named optimizer takes the steps of its package's class, continues from a saved state, and learns."""

import importlib
import io
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.optim.eval_mode import averaged_weights
from library.optim.optimizers import make_optimizer
from library.optim.parameter_steps import load_optimizer_state
from library.optim.updates import make_updater
from library.options.checks_optimizer import named_optimizer
from library.options.groups.optimizer import OptimizerOptions
from library.options.optimizer_choices import OPTIMIZERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
]

NESTEROV = {"nesterov": True, "momentum": 0.9}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("torch.optim.AdamW", {}),
    "AdamW8bit": ("bitsandbytes.optim.AdamW8bit", {}),
    "PagedAdamW": ("bitsandbytes.optim.PagedAdamW", {}),
    "PagedAdamW8bit": ("bitsandbytes.optim.PagedAdamW8bit", {}),
    "PagedAdamW32bit": ("bitsandbytes.optim.PagedAdamW32bit", {}),
    "Lion": ("lion_pytorch.Lion", {}),
    "Lion8bit": ("bitsandbytes.optim.Lion8bit", {}),
    "PagedLion8bit": ("bitsandbytes.optim.PagedLion8bit", {}),
    "SGDNesterov": ("torch.optim.SGD", NESTEROV),
    "SGDNesterov8bit": ("bitsandbytes.optim.SGD8bit", NESTEROV),
    "DAdaptation": ("dadaptation.experimental.DAdaptAdamPreprint", {}),
    "DAdaptAdamPreprint": ("dadaptation.experimental.DAdaptAdamPreprint", {}),
    "DAdaptAdaGrad": ("dadaptation.DAdaptAdaGrad", {}),
    "DAdaptAdam": ("dadaptation.DAdaptAdam", {}),
    "DAdaptAdan": ("dadaptation.DAdaptAdan", {}),
    "DAdaptAdanIP": ("dadaptation.experimental.DAdaptAdanIP", {}),
    "DAdaptLion": ("dadaptation.DAdaptLion", {}),
    "DAdaptSGD": ("dadaptation.DAdaptSGD", {}),
    "Prodigy": ("prodigyopt.Prodigy", {}),
    "Adafactor": ("transformers.optimization.Adafactor", {"lr": None, "relative_step": True}),
    "AdamWScheduleFree": ("schedulefree.AdamWScheduleFree", {}),
    "RAdamScheduleFree": ("schedulefree.RAdamScheduleFree", {}),
    "SGDScheduleFree": ("schedulefree.SGDScheduleFree", {}),
    "CAME": ("pytorch_optimizer.CAME", {}),
    "AdEMAMix": ("pytorch_optimizer.AdEMAMix", {}),
    "bitsandbytes.optim.AdEMAMix8bit": ("bitsandbytes.optim.AdEMAMix8bit", {}),
    "bitsandbytes.optim.PagedAdEMAMix8bit": ("bitsandbytes.optim.PagedAdEMAMix8bit", {}),
    "bitsandbytes.optim.RMSprop8bit": ("bitsandbytes.optim.RMSprop8bit", {}),
    "bitsandbytes.optim.Adagrad8bit": ("bitsandbytes.optim.Adagrad8bit", {}),
    "prodigyplus.ProdigyPlusScheduleFree": ("prodigyplus.ProdigyPlusScheduleFree", {}),
    "RMSprop": ("torch.optim.RMSprop", {}),
}
"""What each name stands for, with the arguments it is given beside the rate."""

NAMES = [*CLASSES, "Muon"]


def needs(name: str) -> None:
    """Skip where an optional package is not installed."""
    choice = named_optimizer(OptimizerOptions(optimizer_type=name))
    pytest.importorskip((choice.class_path if choice else CLASSES[name][0]).partition(".")[0])


def rate_of(name: str) -> float:
    return 1.0 if name.startswith(("DAdapt", "Prodigy", "prodigyplus")) else 1e-2


def tensors() -> list[nn.Parameter]:
    """A matrix large enough for 8-bit state, a convolution and a vector."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 72), (4, 3, 3, 3), (8,))]


def steps(parameters: list[nn.Parameter], seeds: range, *optimizers: torch.optim.Optimizer) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def direct(name: str, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Make the package's class itself; Muon is two of torch's."""
    if name == "Muon":
        adamw = torch.optim.AdamW(parameters[1:], lr=1e-2, weight_decay=0.1)
        return [torch.optim.Muon(parameters[:1], lr=1e-2, adjust_lr_fn="match_rms_adamw"), adamw]
    path, arguments = CLASSES[name]
    module, _, cls = path.rpartition(".")
    optimizer = getattr(importlib.import_module(module), cls)(parameters, **{"lr": rate_of(name), **arguments})
    if hasattr(optimizer, "train"):
        optimizer.train()
    return [optimizer]


def assert_equal(one: list[nn.Parameter], other: list[nn.Parameter]) -> None:
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def test_every_name_is_held_to_its_class() -> None:
    assert {name.lower() for name in NAMES} >= set(OPTIMIZERS)


@pytest.mark.parametrize("name", NAMES)
def test_the_steps_are_those_of_the_packages_class_and_continue_from_a_saved_state(name: str) -> None:
    needs(name)
    parameters, theirs, resumed = tensors(), tensors(), tensors()
    options = OptimizerOptions(optimizer_type=name, learning_rate=rate_of(name))
    optimizer = make_optimizer(options, [{"params": parameters}])
    steps(parameters, range(8), optimizer)
    steps(theirs, range(8), *direct(name, theirs))
    assert_equal(parameters, theirs)
    assert all(not torch.equal(parameter, start) for parameter, start in zip(parameters, resumed, strict=True))

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = make_optimizer(options, [{"params": resumed}])
    load_optimizer_state(again, torch.load(file, weights_only=True))
    for copy, parameter in zip(resumed, parameters, strict=True):
        copy.data.copy_(parameter.data)
    steps(parameters, range(8, 14), optimizer)
    steps(resumed, range(8, 14), again)
    assert_equal(parameters, resumed)


def test_the_arguments_of_muon_reach_both_of_its_halves_and_each_group_keeps_its_rate() -> None:
    parameters, theirs = tensors(), tensors()
    options = OptimizerOptions(
        optimizer_type="muon",
        optimizer_args=("betas=0.8,0.9", "weight_decay=0.2", "momentum=0.5", "adjust_lr_fn='original'"),
        learning_rate=1e-2,
    )
    optimizer = make_optimizer(options, [{"params": parameters[:2], "lr": 2e-2}, {"params": parameters[2:]}])
    muon = torch.optim.Muon(theirs[:1], lr=2e-2, weight_decay=0.2, momentum=0.5)
    rest = [{"params": theirs[1:2], "lr": 2e-2}, {"params": theirs[2:]}]
    steps(parameters, range(4), optimizer)
    steps(theirs, range(4), muon, torch.optim.AdamW(rest, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.2))
    assert_equal(parameters, theirs)


class Denoiser(nn.Module):
    """A frozen layer with a low-rank adapter between two small ones: predicts the noise in points of a plane."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.base, self.last = nn.Linear(3, 64), nn.Linear(64, 64), nn.Linear(64, 2)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        nn.init.normal_(self.up.weight, std=0.02)
        self.norm, self.strength = nn.LayerNorm(64), nn.Parameter(torch.ones(()))

    def loss(self, seed: int) -> Tensor:
        """The mean squared error of the predicted noise, on points of a circle."""
        generator = torch.Generator().manual_seed(seed)
        angle = 2 * torch.pi * torch.rand(64, 1, generator=generator)
        points, noise = torch.cat([angle.cos(), angle.sin()], 1), torch.randn(64, 2, generator=generator)
        t = torch.rand(64, 1, generator=generator)
        noisy = (1 - t).sqrt() * points + t.sqrt() * noise
        hidden = self.first(torch.cat([noisy, t], 1).to(self.first.weight.dtype)).tanh()
        hidden = self.norm(self.base(hidden) + self.strength * self.up(self.down(hidden))).tanh()
        return (self.last(hidden).float() - noise).square().mean()


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def validation(model: Denoiser, optimizer: torch.optim.Optimizer) -> float:
    with averaged_weights(optimizer), torch.no_grad():
        return sum(model.loss(10_000 + number).item() for number in range(4)) / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_steps_lower_the_validation_loss(name: str, dtype: torch.dtype, accelerator: Accelerator) -> None:
    needs(name)
    model = Denoiser().to(dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = OptimizerOptions(optimizer_type=name, learning_rate=rate_of(name))
    optimizer = make_optimizer(options, [{"params": parameters}])
    updater = make_updater(optimizer, accelerator.prepare(optimizer), parameters, options, accelerator)
    before = validation(model, optimizer)
    for update in range(100):
        updater.begin(update)
        model.loss(update).backward()
        updater.finish()
    after = validation(model, optimizer)
    assert after < 0.7 * before
