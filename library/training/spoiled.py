"""Runs a batch again whose loss or gradient was not finite, to see where that began.

What a step draws is a function of the seed and of its place in the run, so the same batch fails in the same way.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from library.dataset.batch import Batch
from library.memory.block_swap import wait_for_swapping
from library.training.loop import TrainingRun, batch_seed
from library.training.non_finite import Spoiled, Taken
from library.training.step import TrainStep

_MOST_IMAGES = 16


@dataclass
class Findings:
    """What a batch did when it was run again."""

    images: list[str] = field(default_factory=list)
    """One line each: file, timestep and loss."""
    has_bad_loss: bool = False
    """Whether the loss of one of them was not finite."""
    module: str | None = None
    """The first module whose output was not finite, with its types."""
    parameter: str | None = None
    """The last parameter, the first of the backward pass, whose gradient was not finite."""


def run_again(run: TrainingRun, taken: Taken, *, with_gradients: bool) -> Findings:
    """Run a batch again as it was trained on; nothing is changed by it.

    Args:
        run: of the batch.
        taken: the batch and its place.
        with_gradients: whether to look at gradients where the loss is finite.
    """
    step: TrainStep = run.accelerator.unwrap_model(run.step)
    findings = Findings()

    def observe(batch: Batch, timesteps: Tensor, losses: Tensor) -> None:
        shown = zip(batch.image_keys, timesteps.tolist(), losses.tolist(), strict=False)
        findings.has_bad_loss = not bool(torch.isfinite(losses).all())
        findings.images = [f"{image} (timestep {timestep:g}, loss {loss:.4g})" for image, timestep, loss in shown]

    torch.manual_seed(batch_seed(run.seed, taken.epoch, taken.index, run.accelerator.process_index))
    run.trainable.on_batch_start()
    with _observed(step, observe), run.accelerator.autocast():
        with torch.set_grad_enabled(with_gradients), _first_not_finite(_modules(step), findings):
            loss = step(taken.batch.to(run.accelerator.device)).mean()
        if with_gradients and findings.module is None and loss.requires_grad:
            named = [(name, each) for name, each in step.trained.named_parameters() if each.requires_grad]
            gradients = torch.autograd.grad(loss, [each for _, each in named], allow_unused=True)
            for (name, _), gradient in zip(named, gradients, strict=True):
                if gradient is not None and not bool(torch.isfinite(gradient).all()):
                    findings.parameter = name
    return findings


def examine(run: TrainingRun, spoiled: Spoiled, *, with_gradients: bool) -> list[str]:
    """Return lines about what made an update not finite, as far as this process had to do with it.

    Every process runs as many batches again, for modules may have to exchange their parameters.
    """
    found = [run_again(run, taken, with_gradients=with_gradients) for taken in spoiled.batches]
    guilty = [each for each in found if each.module or each.parameter or each.has_bad_loss]
    images = [line for each in guilty or found for line in each.images]
    more = [f"and {len(images) - _MOST_IMAGES} more"] if len(images) > _MOST_IMAGES else []
    lines = [f"  image: {line}" for line in [*images[:_MOST_IMAGES], *more]]
    if module := next((each.module for each in found if each.module), None):
        lines.append(f"  first module whose output was not finite: {module}")
    elif parameter := next((each.parameter for each in found if each.parameter), None):
        lines.append(f"  all outputs were finite, but not the gradient of {parameter}")
    else:
        lines.append("  run again, the batch gave finite outputs")
    return lines


def spoiled_weight(module: nn.Module) -> str | None:
    """Return the first trained parameter that has values that are not finite, or None."""
    wait_for_swapping(module)
    for name, parameter in module.named_parameters():
        own: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if parameter.requires_grad and not bool(torch.isfinite(own).all()):
            return name
    return None


def _modules(step: TrainStep) -> Mapping[str, nn.Module]:
    """Return the modules a step runs, by the names people know them by; what is trained beside them last."""
    parts = step.parts
    encoders = {f"text encoder {number}": each for number, each in enumerate(parts.text_encoders, start=1) if each is not None}
    vae = {} if parts.vae is None else {"VAE": parts.vae}
    return {**vae, **encoders, "denoiser": parts.denoiser, "network": step.trained}


@contextmanager
def _observed(step: TrainStep, observe: Callable[[Batch, Tensor, Tensor], None]) -> Iterator[None]:
    before, step.observe = (step.observe, step.num_nan_images), observe
    try:
        yield
    finally:
        step.observe, step.num_nan_images = before


@contextmanager
def _first_not_finite(parts: Mapping[str, nn.Module], findings: Findings) -> Iterator[None]:
    """Note the first module that gives something that is not finite; the innermost ends first."""

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def looked(module: nn.Module, inputs: Any, output: Any) -> None:
            if findings.module is not None:
                return
            for leaf in _numbers(output):
                if not bool(torch.isfinite(leaf).all()):
                    findings.module = _description(name, module, inputs, leaf)
                    return

        return looked

    seen: set[int] = set()
    hooks = []
    for part, root in parts.items():
        for name, module in root.named_modules():
            if id(module) not in seen:
                seen.add(id(module))
                hooks.append(module.register_forward_hook(look(f"{part}: {name}" if name else part)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _description(name: str, module: nn.Module, inputs: Any, output: Tensor) -> str:
    weight = next(module.parameters(), None)
    types = [f"output {_short(output.dtype)}"] + ([f"weights {_short(weight.dtype)}"] if weight is not None else [])
    already = any(not bool(torch.isfinite(leaf).all()) for leaf in _numbers(inputs))
    if weight is not None and not bool(torch.isfinite(weight).all()):
        types.append("its weights are not finite")
    elif already:
        types.append("its input was not finite either")
    return f"{name} ({type(module).__name__}, {', '.join(types)})"


def _numbers(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
