"""A value of another type is taken where it has one reading, and refused with a sentence otherwise."""

from pathlib import Path

import pytest

from library.options.record import options_of
from library.options.scripts import SdxlTrainNetworkOptions
from library.options.values import Unsuitable, file_value, typed_value

OPTIONS = options_of(SdxlTrainNetworkOptions)


@pytest.mark.parametrize(
    ("name", "in_file", "value"),
    [
        ("network_dim", "16", 16),
        ("network_dim", 16.0, 16),
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", 1, 1.0),
        ("enable_bucket", True, True),
        ("enable_bucket", "True", True),
        ("enable_bucket", 0, False),
        ("resolution", 1024, "1024"),
        ("resolution", [832, 1216], "832,1216"),
        ("resolution", "832,1216", "832,1216"),
        ("output_name", 2024, "2024"),
        ("dataset_config", "d.toml", Path("d.toml")),
        ("max_token_length", 75, None),
        ("max_token_length", "225", 225),
        ("save_every_n_steps", 0, None),
        ("vae", "", None),
        ("network_dim", "", None),
        ("caption_separator", "", ""),
        ("text_encoder_lr", 1e-4, (1e-4,)),
        ("text_encoder_lr", ["1e-4", 2e-4], (1e-4, 2e-4)),
        ("network_args", "conv_dim=4", ("conv_dim=4",)),
        ("optimizer_args", ["weight_decay=0.1"], ("weight_decay=0.1",)),
        ("lr_warmup_steps", "10%", 0.1),
        ("lr_warmup_steps", 0.1, 0.1),
        ("lr_warmup_steps", 100, 100),
        ("lr_warmup_steps", 100.0, 100),
        ("zero_stage", "3", 3),
    ],
)
def test_a_configuration_value_with_one_reading_is_taken(name, in_file, value):
    converted = file_value(OPTIONS[name], in_file)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("name", "in_file", "words"),
    [
        ("network_dim", 1.5, "is not a whole number"),
        ("network_dim", True, "is not a whole number"),
        ("network_dim", [1], "is not a whole number"),
        ("network_dim", float("inf"), "is not a whole number"),
        ("learning_rate", True, "is not a number"),
        ("learning_rate", "fast", "is not a number"),
        ("learning_rate", "nan", "is not a finite number"),
        ("enable_bucket", "perhaps", "is not true or false"),
        ("enable_bucket", 2, "is not true or false"),
        ("output_name", 1.5, "is not a text in quotes"),
        ("output_name", False, "is not a text in quotes"),
        ("dataset_config", 3, "is not a path in quotes"),
        ("mixed_precision", "fp61", "is not one of no, fp16, bf16. Did you mean fp16?"),
        ("mixed_precision", False, "is not a text in quotes"),
        ("max_token_length", 100, "is not one of 150, 225"),
        ("optimizer_args", "a=1 b=2", 'Write an array such as ["a=1", "b=2"]'),
        ("lr_warmup_steps", 1.5, "is not a whole number of steps"),
        ("caption_dropout_rate", 1.5, "is out of range. It must be at least 0 and at most 1."),
        ("save_every_n_steps", -1, "is out of range. It must be at least 1."),
        ("huber_c", 0, "is out of range. It must be above 0."),
        ("text_encoder_lr", [1e-4, "x"], "is not a number"),
    ],
)
def test_a_configuration_value_without_one_reading_is_refused(name, in_file, words):
    with pytest.raises(Unsuitable) as refusal:
        file_value(OPTIONS[name], in_file)
    assert words in str(refusal.value)


@pytest.mark.parametrize("text", ["1.5", "1e2", "100.0", "ten", "10 %%"])
def test_typed_steps_are_whole_numbers_fractions_or_percentages(text):
    with pytest.raises(Unsuitable, match="percentage"):
        typed_value(OPTIONS["lr_warmup_steps"], [text])


@pytest.mark.parametrize(("text", "steps"), [("10%", 0.1), ("0.1", 0.1), ("100", 100), ("100%", 1.0), ("0", 0)])
def test_typed_steps_are_read_as_sd_scripts_reads_them(text, steps):
    assert typed_value(OPTIONS["lr_warmup_steps"], [text]) == steps


def test_an_empty_path_from_an_empty_shell_variable_is_left_out():
    assert typed_value(OPTIONS["vae"], [""]) is None
