import logging
import subprocess
import sys

import pytest

from library.options.errors import UsageError
from networks.lora_args import LoRAArgs, parse_lora_args
from networks.lora_blocks import block_index, block_lr_weights, parse_middle_weights, parse_side_weights


def test_text_becomes_numbers():
    given = {"conv_dim": "8", "conv_alpha": " 4.5 ", "rank_dropout": "0.1", "loraplus_lr_ratio": "16", "dropout": None}
    assert parse_lora_args(given) == LoRAArgs(conv_dim=8, conv_alpha=4.5, rank_dropout=0.1, loraplus_lr_ratio=16.0)


def test_every_mistake_is_told_at_once_with_the_nearest_name():
    given = {
        "conv_dims": "8",
        "algo": "loha",
        "conv_dim": "8.5",
        "module_dropout": "1",
        "block_dims": "1,2",
        "up_lr_weight": "sinus",
    }
    with pytest.raises(UsageError) as caught:
        parse_lora_args(given)
    problems = caught.value.problems
    assert len(problems) == 6
    assert "conv_dims is not known to networks.lora. Did you mean conv_dim?" in problems[0]
    assert "Known keys: dropout, rank_dropout" in problems[1]
    assert "conv_dim=8.5: a whole number" in problems[2]
    assert "module_dropout=1: a probability from 0 to below 1" in problems[3]
    assert "block_dims=1,2: 23 values separated by commas are expected, one for each block; there are 2" in problems[4]
    assert "up_lr_weight=sinus: numbers separated by commas or one of sine, cosine" in problems[5]


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "x", ""])
def test_a_ratio_must_be_a_number_not_below_zero(value):
    with pytest.raises(UsageError, match="loraplus_lr_ratio"):
        parse_lora_args({"loraplus_lr_ratio": value})


def test_an_argument_that_does_nothing_on_its_own_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        parse_lora_args({"conv_alpha": "1"})
    assert "conv_alpha has no effect without conv_dim or conv_block_dims" in caplog.text


def test_the_arguments_are_checked_without_torch():
    code = "import sys, networks.lora_args, networks.loading; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_block_indices_equal_the_reference(reference):
    for name, index in reference["block_index"].items():
        assert block_index(name) == (None if index == -1 else index), name


CASES = {
    "down sine": {"down": "sine"},
    "down cosine+.25": {"down": "cosine+.25"},
    "up linear": {"up": "linear"},
    "up reverse_linear": {"up": "reverse_linear"},
    "down zeros, mid 0,1,0.5": {"down": "zeros", "mid": "0,1,0.5"},
    "down list of 3 (padded with 1)": {"down": "0.5,0,0.2"},
    "down sine, threshold 0.3": {"down": "sine", "threshold": "0.3"},
    "both too long": {"down": ",".join(["0.1"] * 11), "up": ",".join(["0.2"] * 11)},
}


def test_learning_rate_factors_equal_the_reference(reference):
    assert set(CASES) == set(reference["block_lr_weight"])
    keys = {"down": "down_lr_weight", "mid": "mid_lr_weight", "up": "up_lr_weight", "threshold": "block_lr_zero_threshold"}
    for name, given in CASES.items():
        args = parse_lora_args({keys[key]: value for key, value in given.items()})
        assert args.lr_weights() == pytest.approx(tuple(reference["block_lr_weight"][name]), abs=1e-6), name


def test_one_number_counts_for_all_blocks_of_its_side_and_an_empty_item_is_zero():
    assert parse_side_weights("0.5") == (0.5,) * 9
    assert parse_middle_weights("0.5") == (0.5,) * 3
    assert parse_middle_weights("1,,0.5") == (1.0, 0.0, 0.5)
    assert block_lr_weights() == (1.0,) * 23
    assert parse_lora_args({"conv_dim": "4"}).lr_weights() is None


def test_a_list_of_another_length_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        parse_side_weights("1,0.5")
    assert "2 numbers are given for 9 blocks" in caplog.text


@pytest.mark.parametrize("text", ["sine+x", "0.5,a", "linear+1,2"])
def test_what_is_neither_numbers_nor_a_preset_is_refused(text):
    with pytest.raises(ValueError, match="expected"):
        parse_side_weights(text)
