"""Prompt lines and their options, against what sd-scripts makes of them."""

import json
from pathlib import Path

import pytest

from library.generation.prompt_line import GENERATION, SAMPLES, parse_prompt_line

COMPAT = Path(__file__).parents[1] / "compat"
PROMPTS = json.loads((COMPAT / "prompt_reference_values.json").read_text(encoding="utf-8"))
TRAINING = json.loads((COMPAT / "training_reference_values.json").read_text(encoding="utf-8"))

PROMPT_IS_NO_OPTION = {"s 10 people walking", "n o p", "w 64 pixel art", "n bad prompt start --w 64", "w 100 words --h 512"}
"""Lines whose prompt sd-scripts mistakes for an option."""
OTHER_FAMILIES = {"guidance_scale", "flow_shift", "cfg_trunc_ratio", "renorm_cfg", "controlnet_image"}

SAMPLE_LINES = {case["line"]: case["result"] for case in PROMPTS["training_prompt_lines"]["cases"]} | TRAINING[
    "sample_prompt_lines"
]


@pytest.mark.parametrize(("line", "expected"), [item for item in SAMPLE_LINES.items() if item[0] not in PROMPT_IS_NO_OPTION])
def test_sample_lines_are_read_as_by_sd_scripts(line, expected):
    parsed = parse_prompt_line(line, SAMPLES, "line 1")
    used = {key: value for key, value in expected.items() if key not in OTHER_FAMILIES}
    assert {"prompt": parsed.prompt, **parsed.values} == used
    assert bool(OTHER_FAMILIES & expected.keys()) <= bool(parsed.notes), "what changes nothing is told"


@pytest.mark.parametrize("line", sorted(PROMPT_IS_NO_OPTION))
def test_the_prompt_itself_is_never_an_option(line):
    parsed = parse_prompt_line(line, SAMPLES, "line 1")
    assert parsed.prompt == line.partition(" --")[0]
    assert parsed.values.keys() <= {"width", "height"}
    assert parsed.values == ({} if " --" not in line else {"width": 64} if "--w" in line else {"height": 512})


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a --x 3", "f.txt, line 2: --x is not an option of a prompt"),
        ("a --sampler euler", "--sampler is not an option"),
        ("a --w 512px", 'only "512" of --w "512px" is used; "px" is dropped'),
        ("a --w abc", '--w "abc" is not used; it takes a whole number of pixels'),
        ("a --d -5", '--d "-5" is not used'),
        ("a --l 1.2.3", '--l "1.2.3" is not used'),
        ("a --n", '--n "" is not used'),
        ("a --c text", "--c changes nothing: a CLIP prompt guides nothing"),
        ("a --t 0.4", "--t changes nothing: the strength acts on an input image"),
    ],
)
def test_whatever_is_not_used_is_told_with_its_line(line, told):
    parsed = parse_prompt_line(line, GENERATION, "f.txt, line 2")
    assert len(parsed.notes) == 1
    assert told in parsed.notes[0]
    assert not parsed.refusals


def test_a_misspelt_option_is_told_the_nearest_one():
    assert "did you mean --ow?" in parse_prompt_line("a --oww 3", GENERATION, "line 1").notes[0]


@pytest.mark.parametrize("option", ["nl 3", "dsd1 3", "dst1 700", "dsr 0.5", "glt 750", "glus 3,0.5,0.5,1"])
def test_options_that_would_change_the_picture_but_are_not_available_are_refused_by_name(option):
    parsed = parse_prompt_line(f"a --{option}", GENERATION, "f.txt, line 2")
    assert parsed.refusals[0].startswith(f"f.txt, line 2: --{option.split()[0]} (")


def test_a_negative_scale_of_none_asks_for_nothing():
    parsed = parse_prompt_line("a --nl none", GENERATION, "line 1")
    assert (parsed.refusals, parsed.notes) == ([], [])


def test_a_later_option_wins_and_case_does_not_matter():
    parsed = parse_prompt_line("a --W 64 --w 128 --N one --n two", GENERATION, "line 1")
    assert parsed.values == {"width": 128, "negative_prompt": "two"}
