"""Reads the prompts of sample images drawn during training: a `.txt`, `.toml` or `.json` file.

- `.txt`: one prompt per line with options (`a cat --n blurry --w 832 --h 1216 --s 28 --d 1 --l 6 --ss euler_a`); empty lines and
  lines that begin with `#` are skipped.
- `.toml`: a table `prompt` of shared values with an array `prompt.subset`; a subset's own value wins.
- `.json`: a list of lines, of objects with the same keys, or of both.
"""

import difflib
import json
import logging
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from library.generation.prompt_file import prompt_lines, read_prompt_text
from library.generation.prompt_line import GUIDED_SAMPLES, SAMPLES, LineGrammar, parse_prompt_line
from library.generation.request import ImageRequest, clamped_steps, with_rounded_size
from library.options.errors import UsageError, UserError
from library.options.groups.sample import SamplerName

logger = logging.getLogger(__name__)

_TEXT_KEYS = ("prompt", "negative_prompt", "sample_sampler", "controlnet_image")
_WHOLE_KEYS = ("width", "height", "sample_steps", "seed")
_DECIMAL_KEYS = ("scale",)
_GUIDE = "controlnet_image"
_IGNORED_KEYS = frozenset({_GUIDE, "guidance_scale", "cfg_trunc_ratio", "renorm_cfg", "flow_shift", "enum"})
_KNOWN_KEYS = (*_TEXT_KEYS, *_WHOLE_KEYS, *_DECIMAL_KEYS)


@dataclass(frozen=True)
class SampleDefaults:
    """What a sample prompt that does not say otherwise is drawn with."""

    width: int = 1024
    """Pixels; the training resolution."""
    height: int = 1024
    steps: int = 30
    cfg_scale: float = 7.5
    sampler: str = "ddim"
    guided: bool = False
    """Whether every picture follows an image, which its prompt then has to name."""


def read_sample_prompts(path: str, defaults: SampleDefaults) -> list[ImageRequest]:
    """Read a sample prompt file.

    Sizes are rounded down to a multiple of 8, at least 64; steps are brought into 1 … 1000. Options that change nothing are named
    in the log.

    Args:
        path: the file; its ending decides how it is read.
        defaults: for whatever a prompt does not give.

    Returns:
        One request per prompt, in the order of the file; a request without a seed draws another picture every time.

    Raises:
        UserError: the file is missing, not UTF-8 or of an ending not listed above.
        UsageError: something in the file is wrong; all of it, told together.
    """
    reader = _READERS.get(Path(path).suffix.lower())
    if reader is None:
        raise UserError(f"{path}: sample prompts are read from .txt, .toml or .json files; rename the file or choose another.")
    problems: list[str] = []
    grammar = GUIDED_SAMPLES if defaults.guided else SAMPLES
    requests = [
        _request(values, where, defaults, problems)
        for where, values in reader(path, read_prompt_text(path, "--sample_prompts"), grammar, problems)
    ]
    if not requests and not problems:
        problems.append(f"{path}: there is no prompt in this file; write one per line, or leave out --sample_prompts.")
    if problems:
        raise UsageError(problems)
    return requests


_Values = dict[str, Any]
_Located = list[tuple[str, _Values]]


def _from_txt(path: str, text: str, grammar: LineGrammar, problems: list[str]) -> _Located:
    return [(where, _line_values(line, where, grammar, problems)) for where, line in prompt_lines(path, text)]


def _from_toml(path: str, text: str, grammar: LineGrammar, problems: list[str]) -> _Located:
    try:
        table = tomllib.loads(text).get("prompt")
    except tomllib.TOMLDecodeError as error:
        problems.append(f"{path}: not a TOML file: {error}.")
        return []
    if not isinstance(table, dict) or not isinstance(subsets := table.get("subset", [{}]), list):
        problems.append(f"{path}: a table [prompt] with [[prompt.subset]] entries is expected.")
        return []
    shared = {key: value for key, value in table.items() if key != "subset"}
    return [
        (where, {**shared, **_object_values(subset, where, problems)})
        for number, subset in enumerate(subsets, 1)
        for where in [f"{path}, prompt {number}"]
    ]


def _from_json(path: str, text: str, grammar: LineGrammar, problems: list[str]) -> _Located:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        problems.append(f"{path}, line {error.lineno}: not a JSON file: {error.msg}.")
        return []
    if not isinstance(entries, list):
        problems.append(f"{path}: a list of prompts is expected, [ … ], not {type(entries).__name__}.")
        return []
    return [
        (where, _line_values(entry, where, grammar, problems) if isinstance(entry, str) else _object_values(entry, where, problems))
        for number, entry in enumerate(entries, 1)
        for where in [f"{path}, prompt {number}"]
    ]


_READERS = {".txt": _from_txt, ".toml": _from_toml, ".json": _from_json}


def _line_values(line: str, where: str, grammar: LineGrammar, problems: list[str]) -> _Values:
    parsed = parse_prompt_line(line, grammar, where)
    for note in parsed.notes:
        logger.warning(note)
    problems.extend(parsed.refusals)
    return {"prompt": parsed.prompt, **parsed.values}


def _object_values(entry: object, where: str, problems: list[str]) -> _Values:
    if not isinstance(entry, dict):
        problems.append(f"{where}: a text or a table of keys is expected, not {entry!r}.")
        return {"prompt": ""}
    return entry


def _request(values: Mapping[str, Any], where: str, defaults: SampleDefaults, problems: list[str]) -> ImageRequest:
    """Make the request; whatever is wrong goes to `problems`, and a default stands in for it."""
    used = {_GUIDE} if defaults.guided else set()
    ignored_keys = _IGNORED_KEYS - used
    checked = {key: _checked(key, value, where, problems) for key, value in values.items() if key not in ignored_keys}
    if ignored := sorted(ignored_keys & values.keys()):
        logger.warning(f"{where}: {', '.join(ignored)} change nothing here.")
    given = {key: value for key, value in checked.items() if value is not None}
    if "prompt" not in values:
        problems.append(f"{where}: there is no key prompt.")
    sampler = given.get("sample_sampler", defaults.sampler)
    if sampler not in get_args(SamplerName):
        problems.append(f'{where}: there is no sampler "{sampler}"; there are {", ".join(get_args(SamplerName))}.')
    return with_rounded_size(
        ImageRequest(
            prompt=given.get("prompt", ""),
            negative_prompt=given.get("negative_prompt", ""),
            width=given.get("width", defaults.width),
            height=given.get("height", defaults.height),
            steps=clamped_steps(given.get("sample_steps", defaults.steps)),
            cfg_scale=given.get("scale", defaults.cfg_scale),
            seed=given.get("seed"),
            sampler=sampler,
            guides=_guides(given.get(_GUIDE), where, problems) if defaults.guided else (),
            raw_prompt=given.get("prompt", ""),
        )
    )


def _guides(path: str | None, where: str, problems: list[str]) -> tuple[str, ...]:
    """Return the image that the picture follows; noted where there is none."""
    if path is None:
        problems.append(f"{where}: there is no image that the picture is to follow. Add --cn IMAGE (in tables {_GUIDE}).")
        return ()
    if not Path(path).is_file():
        problems.append(f"{where}: there is no image {path} (--cn). Check the path.")
    return (path,)


def _checked(key: str, value: object, where: str, problems: list[str]) -> Any:
    """Return the value in the type its key has, or None with the problem noted."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if key in _TEXT_KEYS and isinstance(value, str):
        return value
    if key in _DECIMAL_KEYS and number is not None and number >= 0:
        return float(number)
    if key in _WHOLE_KEYS and number is not None and number >= 0 and number == int(number):
        return int(number)
    if key in _KNOWN_KEYS:
        kind = "a text" if key in _TEXT_KEYS else "a whole number, not negative" if key in _WHOLE_KEYS else "a number, not negative"
        problems.append(f"{where}: {key} is {value!r}; it must be {kind}.")
    else:
        near = difflib.get_close_matches(key, _KNOWN_KEYS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_KNOWN_KEYS)}."
        problems.append(f'{where}: "{key}" is not a key of a prompt; {hint}')
    return None
