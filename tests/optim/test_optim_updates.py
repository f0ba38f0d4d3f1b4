"""Updates inside the backward pass equal those after it, bfloat16 learns from small steps, and what cannot be right is refused."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from library.optim import updates
from library.optim.optimizers import make_optimizer
from library.optim.parameter_steps import load_optimizer_state
from library.optim.stochastic_rounding import round_stochastically
from library.optim.updates import accept_half_gradients, chunked, fused_groups, make_updater
from library.options.checks_optimizer import steps_alone
from library.options.errors import UserError
from library.options.groups.optimizer import OptimizerOptions
from library.options.optimizer_choices import OPTIMIZERS, TORCH_OPTIMIZERS

REFERENCE = json.loads((Path(__file__).parents[1] / "compat" / "training_reference_values.json").read_text(encoding="utf-8"))
FIXED = ("relative_step=False", "scale_parameter=True", "warmup_init=False")
ALONE = [
    name
    for name in (*(choice.name for choice in OPTIMIZERS.values()), *TORCH_OPTIMIZERS)
    if steps_alone(OptimizerOptions(optimizer_type=name))
]

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


class Model(nn.Module):
    """A few layers of every kind of tensor; one is large enough for 8-bit state, one takes no part in the loss."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 4)
        self.unused = nn.Linear(3, 3)
        self.to(dtype)

    def loss(self, seed: int) -> torch.Tensor:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)).to(self.first.weight.dtype)
        return self.last(self.norm(self.first(x)).tanh()).square().mean()


def train(
    options: OptimizerOptions,
    updates: int = 4,
    dtype: torch.dtype = torch.float32,
    start: dict | None = None,
    rates: tuple[float, float] = (1e-2, 2e-2),
):
    model = Model(dtype)
    parameters = list(model.parameters())
    optimizer = make_optimizer(options, [{"params": parameters[:3], "lr": rates[0]}, {"params": parameters[3:], "lr": rates[1]}])
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(optimizer)
    updater = make_updater(optimizer, prepared, parameters, options, accelerator)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    first = 0
    if start is not None:
        model.load_state_dict(start["model"])
        load_optimizer_state(prepared, start["optimizer"])
        schedule.load_state_dict(start["schedule"])
        first = start["updates"]
    for update in range(first, updates):
        updater.begin(update)
        model.loss(update).backward()
        assert updater.finish()
        schedule.step()
        assert all(parameter.grad is None for parameter in parameters)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    return model, state | {"updates": updates}


def options_of(name: str, **more: object) -> OptimizerOptions:
    return OptimizerOptions(
        optimizer_type=name,
        optimizer_args=FIXED if name == "Adafactor" else None,
        learning_rate=1e-2,
        **{"max_grad_norm": 0} | more,
    )


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, tensor), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, theirs), name


class CountsForGroup(torch.optim.Optimizer):
    """Momentum whose bias is corrected by a count for the whole group, as in many optimizers of other packages."""

    def __init__(self, params: list, lr: float) -> None:
        super().__init__(params, {"lr": lr, "step": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 0.1)
                    parameter.sub_(mean / (1 - 0.9 ** group["step"]) * group["lr"])


def test_an_optimizer_of_an_unknown_package_steps_bfloat16_weights_once_for_all(monkeypatch) -> None:
    monkeypatch.setattr(updates, "_CHUNK", 100)
    options = OptimizerOptions(optimizer_type=f"{__name__}.CountsForGroup", max_grad_norm=0)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, state = train(options, updates=20, dtype=dtype)
        moved[dtype] = (model.first.weight.float() - Model(dtype).first.weight.float()).flatten()
        assert [group["step"] for group in state["optimizer"]["param_groups"]] == [20, 20]
    full, half = moved.values()
    assert (half @ full / full.square().sum()).item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("fused", [{"fused_backward_pass": True}, {"fused_optimizer_groups": 3}], ids=["each", "groups"])
def test_stepping_in_the_backward_pass_equals_stepping_after_it_bit_for_bit(name, fused, dtype) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        whole, _ = train(options_of(name), dtype=dtype)
        inside, _ = train(options_of(name, **fused), dtype=dtype)
    assert_same(inside, whole)
    assert not torch.equal(inside.first.weight, Model(dtype).first.weight)
    assert torch.equal(inside.unused.weight, Model(dtype).unused.weight)


def test_in_the_backward_pass_each_tensor_is_clipped_by_itself() -> None:
    clipped, _ = train(OptimizerOptions(optimizer_type="SGD", max_grad_norm=1e-3, fused_backward_pass=True), updates=1)
    model = Model()
    model.loss(0).backward()
    for index, (parameter, result) in enumerate(zip(model.parameters(), clipped.parameters(), strict=True)):
        if parameter.grad is not None:
            step = parameter.grad * min(1.0, 1e-3 / (parameter.grad.norm().item() + 1e-6))
            torch.testing.assert_close(result.data, parameter.data - (1e-2 if index < 3 else 2e-2) * step, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("fused", "norm", "told"), [(True, 1.0, True), (True, 0.0, False), (False, 1.0, False)])
def test_that_each_tensor_is_clipped_by_itself_is_told_once(fused: bool, norm: float, told: bool, caplog) -> None:
    with caplog.at_level("INFO", logger="library.optim.updates"):
        train(OptimizerOptions(max_grad_norm=norm, fused_backward_pass=fused), updates=1)
    assert [("--max_grad_norm 1 limits each tensor" in message) for message in caplog.messages] == [True] * told


def test_a_gradient_is_gone_before_the_next_one_is_there() -> None:
    model = Model()
    options = OptimizerOptions(optimizer_type="SGD", fused_backward_pass=True)
    optimizer = make_optimizer(options, [{"params": list(model.parameters())}])
    accelerator = Accelerator(cpu=True)
    make_updater(optimizer, accelerator.prepare(optimizer), list(model.parameters()), options, accelerator)
    most = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: most.append(sum(other.grad is not None for other in model.parameters()))
        )
    model.loss(0).backward()
    assert len(most) == 6 and max(most) == 0


@pytest.mark.parametrize("case", REFERENCE["fused_optimizer_groups"]["cases"])
def test_groups_are_cut_as_sd_scripts_cuts_them(case) -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1)) for _ in range(count)], "lr": rate} for count, rate in case["groups_in"]]
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    cut = fused_groups(groups, OptimizerOptions(fused_optimizer_groups=case["n"]))
    assert [[len(group), rates[group[0]]] for group in cut] == case["resulting_optimizers"]
    assert [parameter for group in cut for parameter in group] == [p for group in groups for p in group["params"]]


@pytest.mark.parametrize("name", ["SGDNesterov", "AdamW", "Adafactor", "AdamW8bit"])
@pytest.mark.parametrize("fused", [{}, {"fused_backward_pass": True}], ids=["after", "inside"])
def test_steps_below_half_an_ulp_move_bfloat16_weights_as_far_as_they_should(name, fused) -> None:
    """Every step is 0.05 ulp at most, so the sum over 200 steps has a standard deviation below √(200 · 0.05) ulp per weight."""
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    ulp = 2.0**-7
    options = OptimizerOptions(
        optimizer_type=name,
        optimizer_args={"SGDNesterov": ("momentum=0.0", "nesterov=False"), "AdamW": ("weight_decay=0.0",)}.get(
            name, ("relative_step=False", "scale_parameter=False") if name == "Adafactor" else ("weight_decay=0.0",)
        ),
        learning_rate=0.05 * ulp,
        max_grad_norm=0,
        **fused,
    )
    optimizer = make_optimizer(options, [{"params": [parameter]}])
    accelerator = Accelerator(cpu=True)
    updater = make_updater(optimizer, accelerator.prepare(optimizer), [parameter], options, accelerator)
    for update in range(200):
        updater.begin(update)
        parameter.float().sum().backward()
        updater.finish()
    moved = (1 - parameter.float().mean().item()) / ulp
    assert abs(moved - 200 * 0.05) < 6 * (200 * 0.05) ** 0.5 / 4096**0.5 + 0.1  # 0.1: 8-bit state and averages that start at 0
    nearest = torch.ones(1, dtype=torch.bfloat16)
    assert (nearest - 0.05 * ulp) == nearest


@pytest.mark.parametrize(
    ("name", "counters", "alike"),
    [("Prodigy", ("d", "d_max"), 0.6), ("AdamWScheduleFree", ("weight_sum", "lr_max"), 0.95)],
)
def test_what_an_optimizer_counts_for_a_whole_group_advances_with_bfloat16_weights(name, counters, alike) -> None:
    """The course is that of float32 weights but for the rounding, which is large beside Prodigy's first steps."""
    rate = 1.0 if name == "Prodigy" else 1e-2
    options = OptimizerOptions(optimizer_type=name, learning_rate=rate, max_grad_norm=0)
    moved, groups = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model, state = train(options, updates=60, dtype=dtype, rates=(rate, rate))
        moved[dtype] = torch.cat(
            [(p.float() - old.float()).flatten() for p, old in zip(model.parameters(), Model(dtype).parameters(), strict=True)]
        )
        groups[dtype] = state["optimizer"]["param_groups"]
    for full, half in zip(groups[torch.float32], groups[torch.bfloat16], strict=True):
        assert half["k"] == full["k"] == 60
        assert [half[key] for key in counters] == pytest.approx([full[key] for key in counters], rel=0.2)
    assert nn.functional.cosine_similarity(moved[torch.float32], moved[torch.bfloat16], dim=0) > alike


def test_rounding_is_right_on_average_and_keeps_what_needs_no_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.full((100_000,), 1 + 0.3 * 2**-7)
    rounded = round_stochastically(value, generator)
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    share = (rounded > 1).float().mean().item()
    assert abs(share - 0.3) < 6 * (0.3 * 0.7 / 100_000) ** 0.5
    special = torch.tensor([0.0, -0.0, 1.5, -2.0, float("inf"), float("-inf"), float("nan")])
    assert torch.equal(round_stochastically(special, generator).float().nan_to_num(7), special.nan_to_num(7))


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        *((name, fused) for name in ("AdamW", "AdamW8bit", "Adafactor", "Lion") for fused in ({}, {"fused_backward_pass": True})),
        ("pytorch_optimizer.SOAP", {}),  # whose state has lists of float32 tensors
    ],
)
def test_a_state_that_was_saved_continues_bit_for_bit(tmp_path, name, fused) -> None:
    options = options_of(name, **fused)
    whole, _ = train(options, updates=5, dtype=torch.bfloat16)
    _, saved = train(options, updates=2, dtype=torch.bfloat16)
    torch.save(saved, tmp_path / "state.pt")
    resumed, _ = train(options, updates=5, dtype=torch.bfloat16, start=torch.load(tmp_path / "state.pt"))
    assert_same(resumed, whole)


def test_bfloat16_moments_stay_in_bfloat16_and_factors_in_float32() -> None:
    _, adam = train(options_of("AdamW"), dtype=torch.bfloat16)
    assert adam["optimizer"]["state"][0]["exp_avg_sq"].dtype == torch.bfloat16
    _, factored = train(options_of("Adafactor"), dtype=torch.bfloat16)
    assert factored["optimizer"]["state"][0]["exp_avg_sq_row"].dtype == torch.float32


def test_several_processes_are_refused_with_the_reason() -> None:
    options = OptimizerOptions(fused_backward_pass=True)
    optimizer = make_optimizer(options, [{"params": [nn.Parameter(torch.zeros(1))]}])
    with pytest.raises(UserError, match="the processes would drift apart"):
        make_updater(optimizer, optimizer, [], options, SimpleNamespace(num_processes=2, scaler=None))


def test_chunks_hold_at_most_so_many_elements() -> None:
    parameters = [nn.Parameter(torch.zeros(count)) for count in (3, 3, 9, 2, 4, 1)]
    assert [[p.numel() for p in chunk] for chunk in chunked(parameters, 6)] == [[3, 3], [9], [2, 4], [1]]


def test_float16_gradients_are_unscaled_and_an_overflow_is_found() -> None:
    scaler = torch.amp.GradScaler(device="cpu", init_scale=8.0)
    accept_half_gradients(scaler)
    parameter = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scaler.scale(parameter.float().sum()).backward()
    scaler.unscale_(optimizer)
    assert parameter.grad.tolist() == [1.0] * 4
    scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == [0.5] * 4
    parameter.grad = torch.full((4,), float("inf"), dtype=torch.float16)
    scaler.step(optimizer)
    assert parameter.tolist() == [0.5] * 4
