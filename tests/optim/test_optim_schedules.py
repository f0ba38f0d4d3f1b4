import json
from pathlib import Path

import pytest
import torch
import transformers

from library.optim.optimizers import make_optimizer
from library.optim.schedules import SCHEDULES, length_in_updates, make_schedule
from library.options.checks_optimizer import schedule_problems
from library.options.errors import UsageError
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.scheduler import SchedulerOptions
from library.options.optimizer_choices import SCHEDULES as SCHEDULE_NAMES

REFERENCE = json.loads((Path(__file__).parents[1] / "compat" / "training_reference_values.json").read_text(encoding="utf-8"))
CASES = REFERENCE["lr_schedulers"]["cases"]


def optimizer_with(*rates):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return make_optimizer(OptimizerOptions(optimizer_type="SGD", learning_rate=rates[0]), groups)


def schedule_of(options, optimizer, num_updates):
    rate = optimizer.param_groups[0]["lr"]
    return make_schedule(options, OptimizerOptions(optimizer_type="SGD", learning_rate=rate), optimizer, num_updates)


def rates_used(schedule, optimizer, count):
    """The rate of each group at update 0, 1, … count − 1."""
    used = []
    for _ in range(count):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return used


@pytest.mark.parametrize("name", CASES)
def test_the_rate_of_every_update_equals_the_reference(name):
    """Lengths count updates; the reference's absolute ones end early on two processes, so that case is held to one process."""
    case = CASES["linear_warmup10" if name == "linear_warmup10_two_processes" else name]
    options, optimizer = SchedulerOptions(**case["options"]), optimizer_with(case["base_lr"])
    if "error" in case:
        with pytest.raises(UsageError):
            schedule_of(options, optimizer, 100)
        return
    expected = {int(k): rate for k, rate in case["lr_used_by_optimizer_step"].items()}
    used = rates_used(schedule_of(options, optimizer, 100), optimizer, max(expected) + 1)
    for k, rate in expected.items():
        assert used[k][0] == pytest.approx(rate, rel=1e-6, abs=1e-12), f"update {k}"


def test_all_schedules_of_the_reference_are_named_and_built():
    assert set(SCHEDULES) == set(SCHEDULE_NAMES)
    assert {case["options"].get("lr_scheduler", "constant") for case in CASES.values() if "error" not in case} == set(SCHEDULES)


LIBRARY_NAMES = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 1},
    "polynomial": {"power": 1.0, "lr_end": 1e-7},
    "inverse_sqrt": {"timescale": None},
    "constant_with_warmup": {},
}


@pytest.mark.parametrize("name", LIBRARY_NAMES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 37), (5, 37), (36, 37)])
def test_schedules_equal_those_of_transformers(name, warmup, total):
    ours, theirs = optimizer_with(0.3), optimizer_with(0.3)
    schedule = schedule_of(SchedulerOptions(lr_scheduler=name, lr_warmup_steps=warmup), ours, total)
    library = transformers.get_scheduler(name, theirs, warmup, total, scheduler_specific_kwargs=LIBRARY_NAMES[name])
    for mine, reference in zip(rates_used(schedule, ours, total + 1), rates_used(library, theirs, total + 1), strict=True):
        assert mine == pytest.approx(reference, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("warmup_type", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("decay_type", ["linear", "cosine", "1-sqrt"])
def test_warmup_stable_decay_equals_that_of_transformers_in_every_shape(warmup_type, decay_type):
    ours, theirs = optimizer_with(1.0), optimizer_with(1.0)
    arguments = (f"warmup_type='{warmup_type}'", f"decay_type='{decay_type}'")
    options = SchedulerOptions(
        lr_scheduler="warmup_stable_decay",
        lr_warmup_steps=7,
        lr_decay_steps=9,
        lr_scheduler_min_lr_ratio=0.2,
        lr_scheduler_args=arguments,
    )
    library = transformers.optimization.get_wsd_schedule(
        theirs, 7, 9, num_stable_steps=14, warmup_type=warmup_type, decay_type=decay_type, min_lr_ratio=0.2
    )
    for mine, reference in zip(rates_used(schedule_of(options, ours, 30), ours, 33), rates_used(library, theirs, 33), strict=True):
        assert mine == pytest.approx(reference, rel=1e-9, abs=1e-12)


def test_the_first_update_of_a_warmup_has_rate_zero():
    for name in set(SCHEDULES) - {"constant", "piecewise_constant"}:
        optimizer = optimizer_with(1.0)
        options = SchedulerOptions(lr_scheduler=name, lr_warmup_steps=3, lr_scheduler_min_lr_ratio=0.0)
        schedule_of(options, optimizer, 10)
        assert optimizer.param_groups[0]["lr"] == 0.0, name


def test_each_group_keeps_its_share_of_the_rate():
    optimizer = optimizer_with(1e-3, 5e-4)
    for first, second in rates_used(
        schedule_of(SchedulerOptions(lr_scheduler="cosine", lr_warmup_steps=2), optimizer, 9), optimizer, 9
    ):
        assert second == pytest.approx(first / 2)


def test_polynomial_ends_relative_to_the_rate_of_the_optimizer():
    optimizer = optimizer_with(1e-3, 5e-4)
    options = SchedulerOptions(lr_scheduler="polynomial", lr_scheduler_args=("lr_end=1e-4",))
    assert rates_used(schedule_of(options, optimizer, 5), optimizer, 6)[5] == pytest.approx([1e-4, 5e-5])


def test_the_lowest_rate_can_be_given_as_a_number():
    optimizer = optimizer_with(0.5)
    options = SchedulerOptions(lr_scheduler="cosine_with_min_lr", lr_scheduler_args=("min_lr=0.1",))
    assert rates_used(schedule_of(options, optimizer, 8), optimizer, 9)[8][0] == pytest.approx(0.1)


def test_a_float_length_is_a_share_of_the_run_and_an_int_is_a_number_of_updates():
    assert length_in_updates(0.1, 105) == 10
    assert length_in_updates(1.0, 105) == 105
    assert length_in_updates(1, 105) == 1


def test_lengths_of_the_command_line_forms_of_the_reference(training_reference):
    expected = {"0": 0, "1": 1, "100": 100, "0.1": 100, "10%": 100, "100%": 1000, "0.5%": 5}
    for text, parsed in training_reference["warmup_steps_cli_parsing"].items():
        if text in expected:
            value = int(parsed["value"]) if parsed["type"] == "int" else float(parsed["value"])
            assert length_in_updates(value, 1000) == expected[text]


def test_the_rate_moves_once_per_update_under_accumulation(training_reference):
    """Ten batches an epoch, four to an update, the last window flushed: factor 1/(k + 1) gives the reference rates."""
    optimizer = optimizer_with(1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))
    updates = []
    for epoch in range(2):
        for batch in range(10):
            if batch % 4 == 3 or batch == 9:
                optimizer.step()
                schedule.step()
                updates.append((epoch, batch, schedule.last_epoch, round(schedule.get_last_lr()[0], 4)))
    expected = [
        (u["epoch"], u["batch_index"], u["scheduler_last_epoch"], u["lr_after"])
        for u in training_reference["accumulation_and_scheduler"]["updates"]
    ]
    assert updates == expected


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_saved_schedule_continues_exactly(name, tmp_path):
    options = SchedulerOptions(
        lr_scheduler=name,
        lr_warmup_steps=0 if name == "constant" else 3,
        lr_decay_steps=5,
        lr_scheduler_min_lr_ratio=0.1,
        lr_scheduler_args=("step_rules='1:4,0.5:7,0.1'",) if name == "piecewise_constant" else None,
    )
    whole, first, second = (optimizer_with(0.7, 0.3) for _ in range(3))
    expected = rates_used(schedule_of(options, whole, 12), whole, 12)
    before = schedule_of(options, first, 12)
    rates_used(before, first, 5)
    torch.save((first.state_dict(), before.state_dict()), tmp_path / "state.bin")
    after = schedule_of(options, second, 12)
    optimizer_state, schedule_state = torch.load(tmp_path / "state.bin", weights_only=True)
    second.load_state_dict(optimizer_state)
    after.load_state_dict(schedule_state)
    assert rates_used(after, second, 7) == expected[5:]


def test_schedule_free_optimizers_ignore_schedule_and_warmup(training_reference, caplog):
    schedulefree = pytest.importorskip("schedulefree")
    expected = training_reference["schedulefree_scheduler"]
    options = OptimizerOptions(optimizer_type="AdamWScheduleFree", learning_rate=0.3)
    optimizer = make_optimizer(options, [{"params": [torch.nn.Parameter(torch.zeros(2))]}])
    assert isinstance(optimizer, schedulefree.AdamWScheduleFree)
    with caplog.at_level("WARNING"):
        schedule = make_schedule(SchedulerOptions(lr_scheduler="constant", lr_warmup_steps=10), options, optimizer, 100)
    assert schedule.get_last_lr() == expected["last_lr"]
    assert "--lr_warmup_steps has no effect" in caplog.text


def test_a_warmup_longer_than_the_run_warns(caplog):
    with caplog.at_level("WARNING"):
        schedule_of(SchedulerOptions(lr_scheduler="linear", lr_warmup_steps=100), optimizer_with(1.0), 100)
    assert "does not end within the run" in caplog.text


@pytest.mark.parametrize(
    ("scheduler", "optimizer", "words"),
    [
        ({"lr_scheduler": "cosin"}, {}, "no schedule 'cosin'. Did you mean cosine?"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 10}, {}, "Choose --lr_scheduler constant_with_warmup"),
        ({"lr_scheduler": "cosine_with_min_lr"}, {}, "--lr_scheduler_min_lr_ratio"),
        (
            {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1, "lr_scheduler_args": ("min_lr=1e-5",)},
            {},
            "one of",
        ),
        ({"lr_scheduler": "polynomial"}, {"learning_rate": 1e-8}, "ends at 1e-07"),
        ({"lr_scheduler": "piecewise_constant"}, {}, "step_rules is None"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules='1;3'",)}, {}, "step_rules is '1;3'"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": ("decay_type='steep'",)}, {}, "decay_type is 'steep'"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ("power=2",)}, {}, "linear does not know 'power'"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ("power",)}, {}, "is not key=value"),
        ({"lr_scheduler": "adafactor:0.1"}, {}, "belongs to --optimizer_type Adafactor"),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, {}, "not supported"),
        ({"lr_scheduler": "cosine_warmup_with_min_lr"}, {}, "Choose cosine_with_min_lr"),
        ({"lr_scheduler_type": "StepLR", "lr_warmup_steps": 3}, {}, "no effect on --lr_scheduler_type StepLR"),
        ({"lr_scheduler_type": "no_such_package.Rate"}, {}, "pip install no_such_package"),
        ({"lr_warmup_steps": 3}, {"optimizer_type": "adafactor"}, "relative_step=False"),
        ({"lr_scheduler_type": "StepLR"}, {"optimizer_type": "adafactor"}, "leave the schedule out"),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_work_is_refused_in_one_sentence(scheduler, optimizer, words):
    (problem,) = schedule_problems(SchedulerOptions(**scheduler), OptimizerOptions(**optimizer))
    assert words in problem


def test_schedule_free_and_adafactor_need_no_valid_schedule():
    assert schedule_problems(SchedulerOptions(lr_warmup_steps=3), OptimizerOptions(optimizer_type="AdamWScheduleFree")) == []
    assert schedule_problems(SchedulerOptions(lr_scheduler="adafactor:1e-4"), OptimizerOptions(optimizer_type="Adafactor")) == []


@pytest.mark.parametrize("path", ["CosineAnnealingLRR", "torch.optim.lr_scheduler.ReduceLROnPlateau"])
def test_a_schedule_class_that_does_not_exist_or_needs_a_metric_is_refused(path):
    with pytest.raises(UsageError, match=r"has no schedule .* that follows the updates"):
        schedule_of(SchedulerOptions(lr_scheduler_type=path), optimizer_with(1.0), 10)


def test_arguments_a_schedule_class_refuses_are_shown():
    with pytest.raises(UsageError, match=r"StepLR does not accept --lr_scheduler_args .*step_size"):
        schedule_of(SchedulerOptions(lr_scheduler_type="StepLR"), optimizer_with(1.0), 10)
