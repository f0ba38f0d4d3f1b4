"""The weighting grammar, against the parsers of sd-scripts."""

import json
from pathlib import Path

import pytest

from library.models.prompt_weights import WeightedText, parse_prompt_weights

COMPAT = Path(__file__).parents[1] / "compat"
CASES = json.loads((COMPAT / "prompt_reference_values.json").read_text(encoding="utf-8"))["prompt_weights"]["cases"]
TRAINING_CASES = json.loads((COMPAT / "training_reference_values.json").read_text(encoding="utf-8"))["prompt_attention"]

REPAIRED = {"(x:1.3.5)", "BREAKFAST time"}
"""Prompts on which sd-scripts stops or cuts a word in two; see the tests below."""


def pairs(runs: list[WeightedText]) -> list[list[object]]:
    return [[run.text, run.weight] for run in runs]


@pytest.mark.parametrize("case", [c for c in CASES if c["prompt"] not in REPAIRED], ids=lambda c: c["prompt"] or "empty")
def test_runs_equal_the_generation_script(case):
    assert pairs(parse_prompt_weights(case["prompt"], breaks=True)) == case["generation"]


@pytest.mark.parametrize("case", [c for c in CASES if c["prompt"] != "(x:1.3.5)"], ids=lambda c: c["prompt"] or "empty")
def test_runs_without_breaks_equal_the_preview_parser(case):
    assert pairs(parse_prompt_weights(case["prompt"])) == case["training_sample"]


@pytest.mark.parametrize(("prompt", "runs"), TRAINING_CASES.items())
def test_runs_equal_the_weighted_captions_of_training(prompt, runs):
    assert pairs(parse_prompt_weights(prompt)) == runs


def test_a_weight_that_is_no_number_is_text_and_the_bracket_counts():
    assert parse_prompt_weights("(x:1.3.5) y") == [WeightedText("x:1.3.5", 1.1), WeightedText(" y")]


def test_break_inside_a_word_is_text():
    assert parse_prompt_weights("BREAKFAST time", breaks=True) == [WeightedText("BREAKFAST time")]


def test_only_a_real_break_is_marked_as_one():
    assert [run.is_break for run in parse_prompt_weights("a BREAK b", breaks=True)] == [False, True, False]
    assert not any(run.is_break for run in parse_prompt_weights("(BREAK:1.2)"))
