"""A prompt line and its options: `a cat --n blurry --w 832 --h 1216 --s 28 --d 1 --l 6`.

The line is cut at every blank followed by two hyphens. The first piece is the prompt, never an option; each other piece is a name,
one blank and a value; case does not matter. What cannot be used is told, with the line it stands in: nothing is dropped in silence.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from library.generation.request import clamped_steps

_DIGITS = r"\d+"
_DECIMAL = r"[\d.]+"
_TEXT = r".+"


@dataclass(frozen=True)
class LineOption:
    """One option a prompt line may have."""

    key: str
    """Where the value goes in `PromptLine.values`."""
    pattern: str
    """What a value looks like, matched at its start."""
    read: Callable[[str], Any]
    """The matched text to the value; raises ValueError for text that is no value."""
    allowed: str
    """What a value may be, in words."""


@dataclass(frozen=True)
class LineGrammar:
    """The options lines of one kind of prompt file may have."""

    options: Mapping[str, LineOption]
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Options that change nothing here, with the reason; they are noted."""
    not_built: Mapping[str, str] = field(default_factory=dict)
    """Options that would change the picture but cannot be had, with what they are; they are refused."""


@dataclass(frozen=True)
class PromptLine:
    """One line, taken apart."""

    prompt: str
    values: dict[str, Any]
    """Option values by their `LineOption.key`; a later option of the same name wins."""
    notes: list[str]
    """What was not used and why; one sentence each."""
    refusals: list[str]
    """Why the picture asked for cannot be drawn; one sentence each."""


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(",") if number)


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(int(seed) for seed in text.split(",") if seed)
    if not seeds:
        raise ValueError(text)
    return seeds


def _whole(key: str) -> LineOption:
    return LineOption(key, _DIGITS, int, "a whole number of pixels")


_COMMON = {
    "n": LineOption("negative_prompt", _TEXT, str, "a text"),
    "w": _whole("width"),
    "h": _whole("height"),
    "s": LineOption("sample_steps", _DIGITS, lambda text: clamped_steps(int(text)), "a whole number from 1 to 1000"),
    "l": LineOption("scale", _DECIMAL, float, "a number, not negative"),
}
_DEEP_SHRINK = "Deep Shrink"
_GRADUAL_LATENT = "Gradual Latent"

GENERATION = LineGrammar(
    options={
        **_COMMON,
        "d": LineOption("seeds", r"[\d,]+", _seeds, "whole numbers separated by commas, one per repeat"),
        "ow": _whole("original_width"),
        "oh": _whole("original_height"),
        "nw": _whole("original_width_negative"),
        "nh": _whole("original_height_negative"),
        "ct": _whole("crop_top"),
        "cl": _whole("crop_left"),
        "am": LineOption("network_mul", r"[\d.,-]+", _numbers, "numbers separated by commas, one per network"),
    },
    ignored={
        "c": "a CLIP prompt guides nothing",
        "t": "the strength acts on an input image, and there is none",
    },
    not_built={
        "nl": "a scale of the negative prompt",
        **dict.fromkeys(("dsd1", "dst1", "dsd2", "dst2", "dsr"), _DEEP_SHRINK),
        **dict.fromkeys(("glt", "gle", "glr", "gls", "glsn", "glus"), _GRADUAL_LATENT),
    },
)
"""Lines of `--prompt` and `--from_file`."""

SAMPLES = LineGrammar(
    options={
        **_COMMON,
        "d": LineOption("seed", _DIGITS, int, "a whole number, not negative"),
        "ss": LineOption("sample_sampler", r"\S+", str, "the name of a sampler"),
    },
    ignored={
        "cn": "a hint image is only used when a ControlNet is trained",
        **dict.fromkeys(("g", "ctr", "rcfg", "fs"), "it belongs to another model family"),
    },
)
"""Lines of `--sample_prompts` files."""

GUIDED_SAMPLES = replace(
    SAMPLES, options={**SAMPLES.options, "cn": LineOption("controlnet_image", _TEXT, str.strip, "the name of an image file")}
)
"""The same where pictures follow an image."""


def parse_prompt_line(line: str, grammar: LineGrammar, where: str) -> PromptLine:
    """Take one prompt line apart.

    Args:
        line: the text as typed.
        grammar: the options this kind of line may have.
        where: how messages name the line, for example `prompts.txt, line 3`.
    """
    prompt, *pieces = line.strip().split(" --")
    parsed = PromptLine(prompt, {}, [], [])
    for piece in pieces:
        name, _, text = piece.partition(" ")
        option = grammar.options.get(name.lower())
        if option is None:
            _tell_unused(name, text, grammar, where, parsed)
        else:
            _read_value(name, text, option, where, parsed)
    return parsed


def _read_value(name: str, text: str, option: LineOption, where: str, parsed: PromptLine) -> None:
    match = re.match(option.pattern, text)
    try:
        if match is None:
            raise ValueError(text)
        parsed.values[option.key] = option.read(match.group())
    except ValueError:
        parsed.notes.append(f'{where}: --{name} "{text}" is not used; it takes {option.allowed}.')
        return
    if rest := text[match.end() :].strip():
        parsed.notes.append(f'{where}: only "{match.group()}" of --{name} "{text}" is used; "{rest}" is dropped.')


def _tell_unused(name: str, text: str, grammar: LineGrammar, where: str, parsed: PromptLine) -> None:
    lower = name.lower()
    if lower in grammar.ignored:
        parsed.notes.append(f"{where}: --{name} changes nothing: {grammar.ignored[lower]}.")
    elif lower in grammar.not_built:
        if text.strip().lower() != "none":
            parsed.refusals.append(f"{where}: --{name} ({grammar.not_built[lower]}) is not available; take it out of the line.")
    else:
        parsed.notes.append(f"{where}: --{name} is not an option of a prompt{_nearest(lower, grammar.options)}; it is not used.")


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean --w?)`, or all names there are where none is near."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean --{near[0]}?)" if near else f" (there are {', '.join(f'--{known_name}' for known_name in names)})"
