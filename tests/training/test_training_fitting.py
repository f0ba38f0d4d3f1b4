"""Which changes are found for a device, where forecasts are made up."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import pytest

from library.memory.trace import ACTIVATIONS, GRADIENTS, OPTIMIZER, WEIGHTS, Peak
from library.options.parse import parse
from library.options.resuming import compared_options
from library.options.scripts import SdxlTrainNetworkOptions, TrainingOptions
from library.training.fitting import Attempt, Forecasts, attempts, go_on, least, picked_before, why_not
from library.training.forecast import Forecast, needed_for
from library.training.phases import STEP

ARGUMENTS = [
    "--pretrained_model_name_or_path", ".", "--train_data_dir", ".", "--resolution", "64", "--output_dir", "o",
    "--network_module", "networks.lora", "--network_train_unet_only",
]  # fmt: skip
OPTIONS = parse(SdxlTrainNetworkOptions, ARGUMENTS)
GIB = 2**30


def forecast(options: TrainingOptions) -> Forecast:
    """A LoRA: 5 GiB of weights, 4 of optimizer state or 3 in 8 bits, 6 of activations or less."""
    precision = options.precision
    parts = {
        WEIGHTS: 5 * (1 - (precision.offload_fraction or 0)),
        GRADIENTS: 0,
        OPTIMIZER: 0
        if options.optimizer.optimizer_states == "host"
        else 3
        if options.optimizer.optimizer_type == "AdamW8bit"
        else 4,
        ACTIVATIONS: 6 - 5 * precision.checkpoint_fraction * precision.gradient_checkpointing,
    }
    sizes = {name: int(size * GIB) for name, size in parts.items()}
    return Forecast({STEP: Peak(sum(sizes.values()), sizes)})


def found(memory: int) -> tuple[list[Attempt], list[TrainingOptions]]:
    """Return all attempts, and what was traced."""
    traced: list[TrainingOptions] = []

    def trace(options: TrainingOptions) -> Forecast:
        traced.append(options)
        return forecast(options)

    return attempts(OPTIONS, forecast(OPTIONS), memory, trace, keeps_the_run=True), traced


@pytest.mark.parametrize(
    ("gib", "flags"),
    [
        (14.1, "--optimizer_type AdamW8bit"),
        (11.6, "--optimizer_type AdamW8bit --gradient_checkpointing --checkpoint_fraction 0.5"),
        (12.6, "--gradient_checkpointing --checkpoint_fraction 0.5"),
        (6.1, "--optimizer_type AdamW8bit --gradient_checkpointing --optimizer_states host"),
        (3.1, "--optimizer_type AdamW8bit --gradient_checkpointing --optimizer_states host --offload_fraction 0.6"),
    ],
)
def test_the_cheapest_that_fits_is_found_without_what_it_does_not_need(gib: float, flags: str) -> None:
    tried, _ = found(needed_for(int(gib * GIB)))
    assert tried[-1].flags == flags
    assert tried[-1].forecast == forecast(tried[-1].options)


def test_a_change_that_the_last_one_makes_needless_is_left_out() -> None:
    """The state of a small network is not worth rounding or moving where blocks are swapped anyway."""

    def trace(options: TrainingOptions) -> Forecast:
        parts = dict(forecast(options).peak.parts)
        parts[OPTIMIZER] //= 10
        return Forecast({STEP: Peak(sum(parts.values()), parts)})

    tried = attempts(OPTIONS, trace(OPTIONS), needed_for(int(5.1 * GIB)), trace, keeps_the_run=True)
    assert tried[-1].flags == "--gradient_checkpointing --offload_fraction 0.3"
    assert tried[-1].forecast == trace(tried[-1].options)


def test_a_search_takes_few_traces() -> None:
    """What saves most is traced first, and alone where it is not enough; what cannot save enough is not traced at all."""
    tried, traced = found(GIB // 4)
    assert len(tried) == len(traced) == 1 and tried[0].flags.endswith("--offload_fraction 0.9 --base_quant nf4")
    for gib in range(2, 15):
        tried, traced = found(needed_for(gib * GIB))
        assert len(traced) <= 8 and tried[-1].forecast.needed <= needed_for(gib * GIB), gib
    _, traced = found(needed_for(int(3.5 * GIB)))
    assert all(options.precision.gradient_checkpointing for options in traced if options.optimizer.optimizer_type == "AdamW8bit")


def test_a_forecast_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[TrainingOptions] = []

    class Made:
        def __init__(self, recipe: Any, setting: Any, *_: Any) -> None:
            self.options = setting.options

        def forecast(self) -> Forecast:
            made.append(self.options)
            return forecast(self.options)

    @dataclass(frozen=True)
    class Holder:
        options: TrainingOptions

    monkeypatch.setattr("library.training.fitting.Tracing", Made)
    forecasts: Any = Forecasts(Holder(OPTIONS), Holder(OPTIONS), ())  # type: ignore[arg-type]
    other = parse(SdxlTrainNetworkOptions, [*ARGUMENTS, "--gradient_checkpointing"])
    for options in (OPTIONS, other, parse(SdxlTrainNetworkOptions, ARGUMENTS), OPTIONS):
        assert forecasts(options) == forecast(options)
    assert made == [OPTIONS, other]


def test_no_change_saves_more_than_it_says() -> None:
    for attempt in found(needed_for(3 * GIB))[0]:
        assert attempt.forecast.peak.total >= least(forecast(OPTIONS).peak, attempt.changes)


@pytest.mark.parametrize(
    ("given", "began", "flags"),
    [
        ([], ["--gradient_checkpointing"], ["--gradient_checkpointing"]),
        (
            [],
            ["--optimizer_type", "AdamW8bit", "--offload_fraction", "0.6", "--optimizer_states", "host"],
            ["--optimizer_type AdamW8bit", "--optimizer_states host", "--offload_fraction 0.6"],
        ),
        (["--base_quant", "fp8"], ["--base_quant", "nf4"], ["--base_quant nf4"]),
        (["--optimizer_type", "Lion"], ["--optimizer_type", "AdamW8bit"], []),  # given otherwise: compared with the state, not lost
        (["--cache_latents"], [], []),
        ([], ["--cache_latents"], []),
        ([], [], []),
    ],
)
def test_a_resumed_run_has_what_was_picked_for_it_and_what_was_given(given: list[str], began: list[str], flags: list[str]) -> None:
    recorded = compared_options(parse(SdxlTrainNetworkOptions, [*ARGUMENTS, *began]))
    assert [change.flags for change in picked_before(parse(SdxlTrainNetworkOptions, [*ARGUMENTS, *given]), recorded)] == flags


def test_a_resumed_run_that_no_longer_keeps_within_its_budget_says_so(caplog: pytest.LogCaptureFixture) -> None:
    began = compared_options(parse(SdxlTrainNetworkOptions, [*ARGUMENTS, "--gradient_checkpointing"]))
    for budget, is_kept in (("12GB", True), ("2GB", False)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            options, forecasted = go_on(parse(SdxlTrainNetworkOptions, [*ARGUMENTS, "--memory_budget", budget]), began, forecast)
        assert options.precision.gradient_checkpointing and forecasted == forecast(options)
        assert "goes on --gradient_checkpointing: 10." in caplog.text
        assert ("That is more than" not in caplog.text) == is_kept


def test_the_memory_of_what_is_divided_is_not_forecast() -> None:
    assert why_not(OPTIONS) is None
    divided = replace(OPTIONS, distributed=OPTIONS.distributed.model_copy(update={"deepspeed": True}))
    assert "DeepSpeed divides" in (why_not(divided) or "")
    prodigy = parse(SdxlTrainNetworkOptions, [*ARGUMENTS, "--optimizer_type", "Prodigy", "--learning_rate", "1"])
    assert why_not(prodigy) is None
    broken = prodigy.optimizer.model_copy(update={"optimizer_args": ("betas=3",)})
    assert "The memory of Prodigy cannot be forecast" in (why_not(replace(prodigy, optimizer=broken)) or "")
