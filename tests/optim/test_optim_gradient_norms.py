"""Norms of gradients: those of the whole update, part by part, before anything limits them."""

import pytest
import torch
from torch import Tensor, nn

from library.optim.gradient_norms import GradientNorms
from library.optim.optimizers import make_optimizer
from library.optim.updates import Updater, make_updater
from library.options.groups.optimizer import OptimizerOptions


class Accelerator:
    """What an updater uses of accelerate, without a float16 scaler."""

    num_processes = 1
    scaler = None
    optimizer_step_was_skipped = False

    @staticmethod
    def clip_grad_norm_(parameters: list[nn.Parameter], limit: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, limit)


def parts(dtype: torch.dtype) -> list[list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [[nn.Parameter(torch.randn(n, 5, generator=generator).to(dtype)) for n in sizes] for sizes in ((2, 3), (4,))]


def loss_of(groups: list[list[nn.Parameter]]) -> Tensor:
    return torch.stack([(each.float() ** 3).sum() for group in groups for each in group]).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [{}, {"fused_backward_pass": True}, {"fused_optimizer_groups": 2}])
def test_each_group_has_its_norm_before_clipping_however_updates_are_made(fused: dict[str, object], dtype: torch.dtype) -> None:
    groups = parts(dtype)
    options = OptimizerOptions(optimizer_type="SGD", learning_rate=1e-3, max_grad_norm=0.1, **fused)
    optimizer = make_optimizer(options, [{"params": group, "lr": 1e-3} for group in groups])
    updater: Updater = make_updater(optimizer, optimizer, [each for group in groups for each in group], options, Accelerator())
    norms = updater.gradient_norms = GradientNorms(optimizer.param_groups)
    for update in range(2):
        expected = [torch.cat([(3 * each.float() ** 2).flatten() for each in group]).norm().item() for group in groups]
        updater.begin(update)
        loss_of(groups).backward()
        updater.finish()
        assert [float(norm) for norm in norms.take()] == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-2)
    assert norms.take() == [0.0, 0.0]


def test_a_scaled_gradient_is_measured_as_it_would_be_unscaled() -> None:
    (group, _) = parts(torch.float32)
    (group[0].sum() * 1024).backward()
    norms = GradientNorms([{"params": group}])
    norms.add(group, torch.tensor(1024.0))
    assert float(norms.take()[0]) == pytest.approx(10**0.5)


def test_a_network_that_wants_to_know_is_told_between_limiting_and_stepping() -> None:
    (group, _) = parts(torch.float32)
    options = OptimizerOptions(optimizer_type="SGD", learning_rate=1.0, max_grad_norm=1.0)
    optimizer = make_optimizer(options, [{"params": group, "lr": 1.0}])
    updater = make_updater(optimizer, optimizer, group, options, Accelerator())
    before, seen = [each.detach().clone() for each in group], []

    def look() -> None:
        unchanged = [torch.equal(*pair) for pair in zip(before, group, strict=True)]
        seen.append((float(nn.utils.get_total_norm([each.grad for each in group])), unchanged))

    updater.before_step = look
    updater.begin(0)
    loss_of([group]).backward()
    updater.finish()
    ((norm, unchanged),) = seen
    assert norm == pytest.approx(1.0, rel=1e-4) and all(unchanged)
