"""The command lines are frozen: every option of sd-scripts' scripts as it is there, and a short list of our own."""

import json
from pathlib import Path

import pytest

from library.options.command_line import scan
from library.options.record import Kind, Option, option_values, options_of
from library.options.scripts import SCRIPTS, ScriptOptions, SdxlTrainNetworkOptions

COMPAT = Path(__file__).parents[1] / "compat" / "cli_options.json"

TYPES = {Kind.TEXT: "str", Kind.PATH: "Path", Kind.INT: "int", Kind.FLOAT: "float", Kind.STEPS: "int_or_float", Kind.FLAG: None}

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.script)


def frozen(script: type[ScriptOptions]) -> dict[str, dict]:
    return {row["dest"]: row for row in json.loads(COMPAT.read_text())[script.script]}


def declared_row(option: Option) -> dict:
    return {
        "flags": [option.flag],
        "kind": "store_true" if option.kind is Kind.FLAG else "store",
        "type": TYPES[option.kind],
        "nargs": "*" if option.many else None,
        "default": option.default,
        "choices": list(option.choices) if option.choices else None,
        "required": False,
    }


@each_script
def test_every_option_has_the_spelling_type_nargs_choices_and_default_of_sd_scripts(script):
    options = options_of(script)
    for name, row in frozen(script).items():
        expected = {key: row[key] for key in ("flags", "kind", "type", "nargs", "default", "choices", "required")}
        if expected["choices"]:
            # None among the choices cannot be typed; a choice without a type is a text.
            expected["choices"] = [choice for choice in expected["choices"] if choice is not None]
            expected["type"] = expected["type"] or "str"
        assert declared_row(options[name]) == expected, name


@each_script
def test_there_are_no_options_beyond_sd_scripts_and_our_list(script):
    assert options_of(script).keys() - frozen(script).keys() == script.additions


@each_script
def test_every_option_stands_in_one_group_and_has_a_sentence_of_help(script):
    names = [name for group in script.groups().values() for name in group.model_fields]
    assert len(names) == len(set(names))
    for option in options_of(script).values():
        assert option.summary.endswith((".", "...")), option.name


@each_script
def test_options_can_be_made_without_arguments_and_do_not_change(script):
    options = script()
    values = option_values(options)
    for name, option in options_of(script).items():
        assert values[name] == option.default
    group = getattr(options, next(iter(script.groups())))
    with pytest.raises(ValueError, match="frozen"):
        setattr(group, next(iter(type(group).model_fields)), None)


@each_script
def test_our_additions_make_no_beginning_of_a_name_ambiguous(script):
    theirs = list(frozen(script))
    for name in theirs:
        for length in range(1, len(name)):
            if [other for other in theirs if other.startswith(name[:length])] == [name]:
                assert scan([f"--{name[:length]}=1"], options_of(script), additions=script.additions).typed.keys() == {name}


def test_a_rate_for_one_text_encoder_wins_over_the_rate_for_both():
    network = SdxlTrainNetworkOptions.groups()["network"]
    assert network().text_encoder_rates() == (None, None)
    assert network(text_encoder_lr=(1e-4,)).text_encoder_rates() == (1e-4, 1e-4)
    assert network(text_encoder_lr=(1e-4, 2e-4)).text_encoder_rates() == (1e-4, 2e-4)
    assert network(text_encoder_lr=(1e-4,), text_encoder_lr2=0).text_encoder_rates() == (1e-4, 0)
    assert network(text_encoder_lr1=3e-4).text_encoder_rates() == (3e-4, None)
