"""Which changes are found for a device, where forecasts are made up."""

from dataclasses import replace

import pytest

from library.memory.trace import ACTIVATIONS, GRADIENTS, OPTIMIZER, WEIGHTS, Peak
from library.options.parse import parse
from library.options.resuming import compared_options
from library.options.scripts import SdxlTrainNetworkOptions, TrainingOptions
from library.training.fitting import Attempt, attempts, least, picked_before
from library.training.forecast import Forecast, needed_for
from library.training.phases import STEP

OPTIONS = parse(
    SdxlTrainNetworkOptions,
    [
        "--pretrained_model_name_or_path", ".", "--train_data_dir", ".", "--resolution", "64", "--output_dir", "o",
        "--network_module", "networks.lora", "--network_train_unet_only",
    ],
)  # fmt: skip
GIB = 2**30


def forecast(options: TrainingOptions) -> Forecast:
    """A LoRA: 5 GiB of weights, 4 of optimizer state or 3 in 8 bits, 6 of activations or less."""
    precision = options.precision
    parts = {
        WEIGHTS: 5 * (1 - (precision.offload_fraction or 0)),
        GRADIENTS: 0,
        OPTIMIZER: 3 if options.optimizer.optimizer_type == "AdamW8bit" else 4,
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

    return list(attempts(OPTIONS, forecast(OPTIONS), memory, trace, keeps_the_run=True)), traced


@pytest.mark.parametrize(
    ("gib", "flags"),
    [
        (14.1, "--optimizer_type AdamW8bit"),
        (11.6, "--optimizer_type AdamW8bit --gradient_checkpointing --checkpoint_fraction 0.5"),
        (12.6, "--gradient_checkpointing --checkpoint_fraction 0.5"),
        (6.1, "--optimizer_type AdamW8bit --gradient_checkpointing --offload_fraction 0.6"),
    ],
)
def test_the_cheapest_that_fits_is_found_without_what_it_does_not_need(gib: float, flags: str) -> None:
    tried, _ = found(needed_for(int(gib * GIB)))
    assert tried[-1].flags == flags
    assert tried[-1].forecast == forecast(tried[-1].options)


def test_changes_that_cannot_save_enough_are_not_traced() -> None:
    _, traced = found(needed_for(int(3.5 * GIB)))
    assert all(options.precision.gradient_checkpointing for options in traced if options.optimizer.optimizer_type == "AdamW8bit")


def test_where_nothing_fits_the_last_attempt_has_everything() -> None:
    tried, _ = found(GIB // 4)
    assert tried[-1].flags.endswith("--offload_fraction 0.9 --base_quant nf4")


def test_no_change_saves_more_than_it_says() -> None:
    for attempt in found(needed_for(3 * GIB))[0]:
        assert attempt.forecast.peak.total >= least(forecast(OPTIONS).peak, attempt.changes)


def test_a_resumed_run_has_what_was_picked_for_it() -> None:
    picked = replace(OPTIONS, precision=OPTIONS.precision.model_copy(update={"gradient_checkpointing": True}))
    assert picked_before(OPTIONS, compared_options(picked)).precision == picked.precision
