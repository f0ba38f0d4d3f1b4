import importlib.util
import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.optimization import Adafactor

from library.optim.optimizers import describe_optimizer, make_optimizer, optimizer_class
from library.optim.schedules import make_schedule
from library.options.checks_optimizer import named_optimizer, optimizer_arguments, optimizer_name, optimizer_problems
from library.options.errors import UsageError
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.scheduler import SchedulerOptions
from library.options.optimizer_choices import OPTIMIZERS


def installed(name: str) -> bool:
    choice = OPTIMIZERS.get(name.lower())
    path = choice.class_path if choice else name if "." in name else "torch"
    return importlib.util.find_spec(path.partition(".")[0]) is not None


def options(name="", *arguments, **more):
    return OptimizerOptions(optimizer_type=name, optimizer_args=tuple(arguments) or None, **more)


def groups(parameters, *rates):
    return [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]


def step(optimizer, parameters, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test_every_name_of_the_reference_gives_its_class_arguments_and_rates_or_an_error(training_reference, parameters):
    for name, expected in training_reference["optimizer_types"].items():
        if "error" in expected:
            with pytest.raises(UsageError, match="there is no optimizer"):
                make_optimizer(options(name), groups(parameters, 1e-4, 1e-4))
            continue
        if not installed(name):
            path = (named_optimizer(options(name)) or OPTIMIZERS["adamw"]).class_path if "." not in name else name
            assert path.partition(".")[0] == expected["class"].partition(".")[0]
            assert path.rpartition(".")[2] == expected["class"].rpartition(".")[2]
            continue
        chosen = options(name, learning_rate=expected["learning_rate_after"] or 1e-4)
        optimizer = make_optimizer(chosen, [{"params": parameters}])
        kwargs = expected["kwargs_string"]
        assert describe_optimizer(chosen) == expected["class"] + (f"({kwargs})" if kwargs else "")
        assert describe_optimizer(chosen).startswith(f"{type(optimizer).__module__}.{type(optimizer).__qualname__}")
        assert optimizer.param_groups[0]["lr"] == expected["learning_rate_after"]
        if expected["lr_scheduler_after"].startswith("adafactor:"):
            schedule = make_schedule(SchedulerOptions(), chosen, optimizer, 10)
            assert schedule.get_last_lr() == [float(expected["lr_scheduler_after"].partition(":")[2])]


@pytest.mark.parametrize("name", [choice.name for choice in OPTIMIZERS.values() if choice.pip])
def test_every_package_that_may_be_missing_is_named_with_its_pip_command(name, monkeypatch):
    choice = OPTIMIZERS[name.lower()]
    package = choice.class_path.partition(".")[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == package else object())
    assert optimizer_problems(options(name)) == [
        f"--optimizer_type {name} needs the package {package}, which is not installed. Run: pip install {choice.pip}"
    ]


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit"])
def test_eight_bit_optimizers_keep_one_byte_per_state_element_and_follow_the_full_ones(name, parameters):
    pytest.importorskip("bitsandbytes")
    full = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    optimizers = [
        make_optimizer(options(n, learning_rate=1e-3), [{"params": ps}])
        for n, ps in ((name, parameters), ("Lion" if "Lion" in name else "AdamW", full))
    ]
    for seed in range(3):
        step(optimizers[0], parameters, seed)
        step(optimizers[1], full, seed)
    assert optimizers[0].state[parameters[0]]["state1"].dtype == torch.uint8
    assert float((parameters[0] - full[0]).detach().abs().mean()) < 5e-4


@pytest.mark.parametrize(("name", "waits"), [("AdamW8bit", 0), ("PagedAdamW8bit", 2)])
def test_eight_bit_optimizers_leave_kernels_where_they_lie_and_wait_only_where_state_is_paged(name, waits, monkeypatch):
    theirs = pytest.importorskip("bitsandbytes.optim.optimizer")
    waited = []
    monkeypatch.setattr(theirs, "sync_gpu", waited.append)
    values = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    stepped = []
    for layout in (torch.contiguous_format, torch.channels_last):
        kernel = torch.nn.Parameter(values.clone(memory_format=layout))
        place, strides = kernel.data_ptr(), kernel.stride()
        optimizer = make_optimizer(options(name, learning_rate=1e-3), [{"params": [kernel]}])
        del waited[:]
        step(optimizer, [kernel])
        assert (kernel.data_ptr(), kernel.stride(), len(waited)) == (place, strides, waits)
        stepped.append(kernel.detach())
    assert torch.equal(*stepped) and not torch.equal(stepped[0], values)


@pytest.mark.parametrize(
    ("name", "arguments", "device", "fused"),
    [
        ("AdamW", (), "cuda", True),
        ("Adam", (), "cuda", True),
        ("SGDNesterov", (), "cuda", True),
        ("AdamW", (), "cpu", None),
        ("AdamW", ("foreach=True",), "cuda", None),
        ("AdamW", ("fused=False",), "cuda", False),
        ("Adagrad", (), "cuda", None),
    ],
)
def test_fused_kernels_are_chosen_on_a_gpu_and_nowhere_else(name, arguments, device, fused):
    with FakeTensorMode():  # a GPU that is not there
        on_device = [torch.nn.Parameter(torch.zeros(8, device=device)) for _ in range(2)]
        optimizer = make_optimizer(options(name, *arguments), groups(on_device, 1e-4, 2e-4))
    assert [group["fused"] for group in optimizer.param_groups] == [fused, fused]
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)


def test_adamw_equals_the_formula_in_float64(parameters):
    optimizer = make_optimizer(
        options("", "weight_decay=0.1", "betas=0.8,0.9", "eps=1e-6", learning_rate=0.01), [{"params": parameters}]
    )
    w, g = parameters[0].detach().double(), torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).double()
    step(optimizer, parameters)
    m, v = 0.2 * g, 0.1 * g * g
    expected = w * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.8)) / ((v / (1 - 0.9)).sqrt() + 1e-6)
    torch.testing.assert_close(parameters[0].detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_every_key_value_text_of_the_reference_is_read_or_refused(training_reference):
    from library.options.checks_optimizer import read_arguments

    for text, expected in training_reference["key_value_args_parsing"].items():
        arguments, problems = read_arguments([text], "--optimizer_args")
        if "error" in expected:
            assert not arguments
            assert len(problems) == 1
            assert repr(text) in problems[0]
        else:
            value = arguments[expected["key"]]
            assert type(value).__name__ == expected["type"]
            assert (list(value) if isinstance(value, tuple) else value) == expected["value"]


def test_a_lower_case_true_is_refused_with_the_right_spelling(parameters):
    with pytest.raises(UsageError, match=r"Write decouple=True\."):
        make_optimizer(options("AdamW", "decouple=true"), [{"params": parameters}])


def test_negative_rates_are_accepted_as_in_the_reference(training_reference, parameters):
    for name, outcome in training_reference["negative_learning_rate"].items():
        arguments = ("relative_step=False", "scale_parameter=False") if name == "Adafactor" else ()
        chosen = options(name, *arguments, learning_rate=-1e-4)
        if outcome == "accepted":
            before = parameters[1].detach().clone()
            optimizer = make_optimizer(chosen, [{"params": parameters}])
            parameters[1].grad = torch.ones(64)
            optimizer.step()
            assert (parameters[1] > before).all()
        else:
            with pytest.raises(UsageError, match=r"-0\.0001 is negative.*Adafactor --optimizer_args relative_step=False"):
                make_optimizer(chosen, [{"params": parameters}])


def test_a_negative_rate_of_one_part_is_refused(parameters):
    with pytest.raises(UsageError, match=r"-0\.5 is negative"):
        make_optimizer(options("AdamW"), groups(parameters, 1e-4, -0.5))


def adafactor_parameters(table):
    return [torch.nn.Parameter(torch.tensor(values)) for values in table["init"]]


@pytest.mark.parametrize("case", ["fixed_lr", "fixed_lr_scaled", "relative", "relative_warmup_init", "fixed_lr_weight_decay"])
def test_adafactor_updates_equal_the_reference(training_reference, case):
    table = training_reference["adafactor"][case]
    matrix_and_vector = adafactor_parameters(table)
    arguments = [f"{key}={value}" for key, value in table["kwargs"].items()]
    optimizer = make_optimizer(options("Adafactor", *arguments, learning_rate=table["lr"] or 1e-4), [{"params": matrix_and_vector}])
    generator = torch.Generator().manual_seed(11)
    for rates in table["per_step"]:
        for p in matrix_and_vector:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        group = optimizer.param_groups[0]
        for p, key in zip(matrix_and_vector, ("lr_matrix", "lr_vector"), strict=True):
            assert float(Adafactor._get_lr(group, optimizer.state[p])) == pytest.approx(rates[key], rel=1e-5)
    for p, expected in zip(matrix_and_vector, table["after"], strict=True):
        torch.testing.assert_close(p.detach(), torch.tensor(expected), rtol=1e-5, atol=1e-7)


def test_the_schedule_of_relative_adafactor_reports_the_rate_of_the_last_update(training_reference):
    table = training_reference["adafactor"]["relative"]
    (matrix, vector) = adafactor_parameters(table)
    chosen = options("Adafactor", learning_rate=1e-4)
    optimizer = make_optimizer(chosen, [{"params": [matrix]}, {"params": [vector]}])
    schedule = make_schedule(SchedulerOptions(), chosen, optimizer, 10)
    assert schedule.get_last_lr() == [1e-4, 1e-4]
    generator = torch.Generator().manual_seed(11)
    for rates in table["per_step"]:
        for p in (matrix, vector):
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        schedule.step()
        assert schedule.get_last_lr() == pytest.approx([rates["lr_matrix"], rates["lr_vector"]], rel=1e-5)
    torch.testing.assert_close(matrix.detach(), torch.tensor(table["after"][0]), rtol=1e-5, atol=1e-7)


def test_relative_adafactor_reports_a_rate_when_the_first_tensor_of_a_group_has_no_gradient(parameters):
    optimizer = make_optimizer(options("Adafactor"), [{"params": parameters}])
    schedule = make_schedule(SchedulerOptions(), options("Adafactor"), optimizer, 10)
    parameters[1].grad = torch.ones(64)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr()[0] > 1e-3


def test_warmup_init_switches_relative_steps_on():
    assert optimizer_arguments(options("Adafactor", "relative_step=False", "warmup_init=True"))["relative_step"] is True


def test_relative_adafactor_drops_the_rates_of_parts_and_says_so(parameters, caplog):
    with caplog.at_level(logging.WARNING):
        optimizer = make_optimizer(options("Adafactor", learning_rate=3e-4), groups(parameters, 1e-4, 2e-4))
    assert [group["lr"] for group in optimizer.param_groups] == [None, None]
    assert "rates of single parts are not used" in caplog.text


def test_fixed_adafactor_keeps_the_rates_of_parts_and_advises_about_clipping(parameters, caplog):
    with caplog.at_level(logging.WARNING):
        optimizer = make_optimizer(
            options("Adafactor", "relative_step=False", "clip_threshold=2.0"), groups(parameters, 1e-4, 2e-4)
        )
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 2e-4]
    assert "--max_grad_norm 0 is advised" in caplog.text
    assert "clip_threshold=1.0; it is 2.0" in caplog.text


def test_prodigy_with_a_small_rate_warns(parameters, caplog):
    pytest.importorskip("prodigyopt")
    with caplog.at_level(logging.WARNING):
        make_optimizer(options("Prodigy", learning_rate=0.1), [{"params": parameters}])
    assert "1.0 is advised" in caplog.text


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptation", "DAdaptAdan"])
def test_one_rate_for_everything_cannot_be_given_to_parts_that_have_their_own(name, parameters):
    with pytest.raises(UsageError, match=r"cannot follow the different learning rates 0\.5, 1\.0"):
        make_optimizer(options(name), groups(parameters, 0.5, 1.0))


def test_a_package_that_finds_one_rate_for_each_part_is_given_different_ones(parameters):
    pytest.importorskip("prodigyplus")
    optimizer = make_optimizer(options("prodigyplus.ProdigyPlusScheduleFree"), groups(parameters, 0.5, 1.0))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.0]


def test_prodigy_with_rate_one_is_quiet(parameters, caplog):
    pytest.importorskip("prodigyopt")
    with caplog.at_level(logging.WARNING):
        make_optimizer(options("Prodigy", learning_rate=1.0), [{"params": parameters}])
    assert not caplog.records


def test_sgd_nesterov_has_momentum_unless_told_otherwise(parameters):
    default = make_optimizer(options("sgdnesterov"), [{"params": parameters}]).param_groups[0]
    other = make_optimizer(options("SGDNesterov", "momentum=0.5"), [{"params": parameters}]).param_groups[0]
    assert (default["nesterov"], default["momentum"], other["momentum"]) == (True, 0.9, 0.5)


def test_eight_bit_sgd_says_that_it_takes_plain_momentum_steps(parameters, caplog):
    pytest.importorskip("bitsandbytes")
    with caplog.at_level(logging.WARNING):
        make_optimizer(options("SGDNesterov8bit"), [{"params": parameters}])
    assert "plain momentum" in caplog.text


@pytest.mark.parametrize(
    ("old", "name"), [({}, "AdamW"), ({"use_8bit_adam": True}, "AdamW8bit"), ({"use_lion_optimizer": True}, "Lion")]
)
def test_old_spellings_choose_their_optimizer(old, name):
    assert optimizer_name(OptimizerOptions(**old)) == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("AdamWW", "AdamW"),
        ("adam", "Adam"),
        ("prodigi", "Prodigy"),
        ("AdEMAMix8bit", "bitsandbytes.optim.AdEMAMix8bit"),
        ("ProdigyPlusScheduleFree", "prodigyplus.ProdigyPlusScheduleFree"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, hint, parameters):
    with pytest.raises(UsageError, match=rf"no optimizer '{name}'\. Did you mean {hint}\?"):
        make_optimizer(options(name), [{"params": parameters}])


def test_an_unknown_class_of_a_known_package_is_refused_with_the_nearest(parameters):
    with pytest.raises(UsageError, match=r"torch\.optim has no optimizer AdamV\. Did you mean Adam"):
        make_optimizer(options("torch.optim.AdamV"), [{"params": parameters}])


def test_something_that_is_no_optimizer_is_refused(parameters):
    with pytest.raises(UsageError, match=r"torch\.nn has no optimizer Linear"):
        make_optimizer(options("torch.nn.Linear"), [{"params": parameters}])


def test_a_missing_package_is_named_with_its_pip_command(parameters):
    with pytest.raises(
        UsageError, match=r"needs the package no_such_package, which is not installed\. Run: pip install no_such_package"
    ):
        make_optimizer(options("no_such_package.Fast"), [{"params": parameters}])


def test_an_unknown_argument_is_refused_with_the_nearest(parameters):
    with pytest.raises(UsageError, match=r"AdamW has no argument 'weight_decoy'\. Did you mean weight_decay\?"):
        make_optimizer(options("AdamW", "weight_decoy=0.1"), [{"params": parameters}])


def test_a_value_the_optimizer_refuses_is_shown_with_its_reason(parameters):
    with pytest.raises(UsageError, match=r"AdamW does not accept its arguments .*betas=\(1\.5, 0\.9\).*Invalid beta"):
        make_optimizer(options("AdamW", "betas=1.5,0.9"), [{"params": parameters}])


def test_the_rate_cannot_be_given_twice(parameters):
    with pytest.raises(UsageError, match="Give it with --learning_rate"):
        make_optimizer(options("AdamW", "lr=1"), [{"params": parameters}])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torch.optim.LBFGS", "wants to evaluate the loss itself"),
        ("bitsandbytes.optim.LARS8bit", "without momentum is not supported"),
        ("pytorch_optimizer.AdamMini", "does not accept its arguments"),
    ],
)
def test_what_an_optimizer_cannot_do_here_is_told_before_training(name, words, parameters):
    with pytest.raises(UsageError, match=words):
        make_optimizer(options(name), [{"params": parameters}])


def test_nothing_to_train_is_a_sentence():
    with pytest.raises(UsageError, match="nothing to train"):
        make_optimizer(options(), [])


def test_metadata_lists_the_arguments_that_were_given():
    described = describe_optimizer(options("AdamW", "weight_decay=0.01", "betas=0.9,0.99"))
    assert described == "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.99))"


def test_any_class_of_torch_optim_can_be_named():
    assert optimizer_class(options("RAdam")) is torch.optim.RAdam
    assert optimizer_class(options("torch.optim.Adagrad")) is torch.optim.Adagrad
