"""The command line is read as argparse reads it, but to the end."""

import random

import pytest

from library.options.command_line import scan
from library.options.record import options_of
from library.options.scripts import SdxlGenImgOptions, SdxlTrainNetworkOptions
from library.options.values import Unsuitable, typed_value
from tests.options.argparse_reference import RefusedError, reference_parser

OPTIONS = options_of(SdxlTrainNetworkOptions)


def read(argv, options=OPTIONS):
    """Our reading: the typed values that differ from the defaults, or None when anything is wrong."""
    line = scan(argv, options)
    try:
        values = {name: typed_value(options[name], texts) for name, texts in line.typed.items()}
    except Unsuitable:
        return None
    return None if line.problems else {name: value for name, value in values.items() if value != options[name].default}


def reference(argv, parser):
    try:
        values = vars(parser.parse_args(argv))
    except RefusedError:
        return None
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if value != parser.get_default(name)}


@pytest.mark.parametrize(
    "command",
    [
        "--learning_rate 1e-4 --network_dim=16 --enable_bucket",
        "--learning_rate=-1e-7 --noise_offset -0.5",
        "--optimizer_args weight_decay=0.01 betas=0.9,0.999 --seed 1",
        "--network_args --seed 3",
        "--text_encoder_lr 1e-4 2e-4 --text_encoder_lr 5e-5",
        "--seed 1 --seed 2",
        "--pretrained model.safetensors --gradient_acc 4",
        "--lr_warmup_steps 10% --lr_decay_steps 0.1",
        "--lr_warmup_steps 100",
        "--lr_warmup_steps 1.5",
        "--max_token_length 150",
        "--zero_stage 3 --mixed_precision bf16",
        "--output_name=a=b",
        "--v2 yes",
        "--v2=yes",
        "--save 1",
        "--mixed_precision fp61",
        "--seed",
        "--seed --v2",
        "--output_name -x",
        "--nonsense",
        "stray",
        "--base_weights a b --base_weights_multiplier 1 -0.5",
    ],
)
def test_a_command_line_means_what_it_means_to_argparse(command):
    argv = command.split()
    expected = reference(argv, reference_parser("sdxl_train_network.py"))
    if "--text_encoder_lr" in argv and expected:
        expected = {**expected, "text_encoder_lr": tuple(expected["text_encoder_lr"])}
    assert read(argv) == expected


def test_random_command_lines_mean_what_they_mean_to_argparse():
    parser = reference_parser("sdxl_gen_img.py")
    options = options_of(SdxlGenImgOptions)
    names = ["--" + name for name in options]
    words = ["1", "0.5", "-1", "-0.5", "a", "", "a b", "-", "--n bad -- quality", "euler", "1,2", "650"]
    draw = random.Random(0)
    accepted = 0
    for _ in range(1500):
        argv = []
        for _ in range(draw.randint(0, 3)):
            name = draw.choice(names)
            name = name[: draw.randint(max(3, len(name) - 6), len(name))]
            attached = draw.random() < 0.2
            values = [draw.choice(words) for _ in range(draw.choice([0, 1, 1, 1, 2]))]
            argv += [f"{name}={values[0]}", *values[1:]] if attached and values else [name, *values]
        expected = reference(argv, parser)
        ours = read(argv, options)
        if ours is None or expected is None:
            # We also refuse what argparse lets through and sd-scripts stumbles over later, such as --steps -1.
            assert ours is None, argv
        else:
            accepted += 1
            assert {name: value for name, value in expected.items() if value != ""} == ours, argv
    assert accepted > 100


def test_negative_rates_in_exponent_notation_need_no_equals_sign():
    assert read(["--learning_rate", "-1e-7"]) == {"learning_rate": -1e-7}


def test_a_prompt_may_begin_with_dashes_when_it_contains_blanks():
    assert read(["--prompt", "--n blurry"], options_of(SdxlGenImgOptions)) == {"prompt": "--n blurry"}


def test_everything_after_two_dashes_is_a_value():
    line = scan(["--network_args", "--", "--odd"], OPTIONS)
    assert line.typed == {"network_args": ("--odd",)}
    assert line.problems == []


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--lernig_rate", "1e-4"], "--lernig_rate is not an option. Did you mean --learning_rate?"),
        (["--mixed-precision", "bf16"], "--mixed-precision is not an option. Did you mean --mixed_precision?"),
        (["--xyzzy", "1"], "--xyzzy is not an option. --help lists all options."),
        (["--seed"], "--seed needs a value. One that starts with a dash is written --seed=VALUE."),
        (["--v2=1"], "--v2 takes no value, but '1' was given. Leave the option out to switch it off."),
        (["--output_name", "my", "lora"], "'lora' stands alone after --output_name. Put a value that contains blanks in quotes."),
        (["lora"], "'lora' stands alone at the start. Put a value that contains blanks in quotes."),
        (["--max_train", "1"], "--max_train could be any of --max_train_steps, --max_train_epochs. Type more of the name."),
    ],
)
def test_a_mistake_is_named_with_what_to_do(argv, sentence):
    assert scan(argv, OPTIONS).problems == [sentence]


def test_an_option_of_another_script_is_called_that():
    assert scan(["--block_lr", "1"], OPTIONS, {"block_lr"}).problems == [
        "--block_lr is an option of other scripts of the suite, not of this one. Leave it out."
    ]


def test_reading_goes_on_after_a_mistake():
    line = scan(["--lernig_rate", "1e-4", "--v2=1", "--seed", "5", "--unknown"], OPTIONS)
    assert len(line.problems) == 3
    assert line.typed["seed"] == ("5",)


@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["--he"], ["--seed", "1", "--help"]])
def test_help_is_seen_wherever_it_stands(argv):
    assert scan(argv, OPTIONS).wants_help
