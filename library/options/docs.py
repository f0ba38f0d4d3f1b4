"""Write the pages that follow from the declarations: `python -m library.options.docs`.

`docs/options.md` is for readers; `docs/options.schema.json` lets an editor complete and check configuration files, and
`docs/schemas/dataset.schema.json` dataset files.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.options.config_file import NOT_WRITTEN
from library.options.dataset_schema import dataset_schema_text
from library.options.effects import effective_options
from library.options.not_built import NOT_BUILT
from library.options.record import Kind, Option, options_of
from library.options.scripts import SCRIPTS, ScriptOptions

DOCS = Path(__file__).parents[2] / "docs"

_LETTERS = dict(zip(SCRIPTS, "FNIXCGLT", strict=True))

_INTRODUCTION = """\
# Options

Every option of every command, by topic. This page is written by `python -m library.options.docs`; change the declarations in
`library/options/groups/`, not the page.

An option is typed `--name value` or `--name=value`; any beginning of the name that fits only one option will do. Lists are typed
with blanks between their values. A switch is on when it is given. Every mistake is told at once, with the nearest known name,
before anything is loaded; the exit status is then 2.

## Configuration files

`--config_file run.toml` reads option values from a TOML file whose keys are the names below. What is typed wins over the file, and
the file over the defaults. Tables such as `[training]` are for the reader's eye: their keys count as if they stood at the top.
Paths are relative to the folder the command is started in. A value in another type is taken where it has only one reading
(`"1"` for 1, `1024` for `"1024"`). A key that only another script knows is skipped with a line that says so, a key nobody knows
with a warning; `--strict_config` makes the latter an error. `--output_config` writes what was typed, without keys and tokens, to
`--config_file` and stops. [options.schema.json](options.schema.json) makes editors complete and check such files: put
`#:schema docs/options.schema.json` into the first line.

## The tables

The last column says which command takes the option. A letter in brackets: it is accepted there, so that a command line can be
reused, but does nothing.
"""

_TYPES = {
    Kind.FLAG: "switch",
    Kind.TEXT: "text",
    Kind.PATH: "path",
    Kind.INT: "whole number",
    Kind.FLOAT: "number",
    Kind.STEPS: "steps, fraction below 1, or `N%`",
}


def options_page() -> str:
    """Return the text of `docs/options.md`."""
    legend = [f"- **{letter}** `{script.script}`: {script.purpose}" for script, letter in _LETTERS.items()]
    parts = [_INTRODUCTION, "\n".join(legend) + "\n"]
    for topic, entries in _by_topic().items():
        rows = [_row(options) for options in entries.values()]
        parts.append(
            f"## {topic}\n\n| Option | Type | Default | Meaning | For |\n| --- | --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(parts)


def config_schema() -> dict[str, Any]:
    """Return the JSON schema of configuration files, for all scripts that read them."""
    declared: dict[str, Option] = {}
    for script in SCRIPTS:
        if "config" in script.groups():
            declared |= {name: option for name, option in options_of(script).items() if name not in NOT_WRITTEN}
    declared = {name: option for name, option in declared.items() if not option.is_secret}
    properties = {name: _property(option) for name, option in declared.items()}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Options in a --config_file",
        "type": "object",
        "properties": {name: {"$ref": f"#/definitions/table/properties/{name}"} for name in properties},
        "additionalProperties": {"$ref": "#/definitions/table"},
        "definitions": {"table": {"type": "object", "properties": properties, "additionalProperties": False}},
    }


def write_pages(folder: Path = DOCS) -> None:
    """Write all pages to `folder`."""
    (folder / "schemas").mkdir(parents=True, exist_ok=True)
    (folder / "options.md").write_text(options_page(), encoding="utf-8")
    (folder / "options.schema.json").write_text(schema_text(), encoding="utf-8")
    (folder / "schemas" / "dataset.schema.json").write_text(dataset_schema_text(), encoding="utf-8")


def schema_text() -> str:
    """Return the text of `docs/options.schema.json`."""
    return json.dumps(config_schema(), indent=1, ensure_ascii=False) + "\n"


def _by_topic() -> dict[str, dict[str, dict[type[ScriptOptions], Option]]]:
    topics: dict[str, dict[str, dict[type[ScriptOptions], Option]]] = {}
    for script in SCRIPTS:
        for name, option in options_of(script).items():
            topics.setdefault(option.group.topic, {}).setdefault(name, {})[script] = option
    return topics


def _row(options: dict[type[ScriptOptions], Option]) -> str:
    option = next(iter(options.values()))
    letters = [
        letter if option.name in effective_options(script) else f"({letter})"
        for script, letter in _LETTERS.items()
        if script in options
    ]
    meaning = f"{option.summary} *Not built yet.*" if option.name in NOT_BUILT else option.summary
    cells = [
        f"`{option.flag}`",
        _type(option),
        _default(option),
        meaning.replace("|", "\\|").replace("<", "\\<"),
        " ".join(letters),
    ]
    return f"| {' | '.join(cells)} |"


def _type(option: Option) -> str:
    if option.choices:
        text = ", ".join(f"`{choice}`" for choice in option.choices)
    else:
        text = ("list of: " if option.many else "") + _TYPES[option.kind]
    return f"{text}, {option.range}" if option.range else text


def _default(option: Option) -> str:
    if option.kind is Kind.FLAG:
        return "off"
    return "" if option.default in (None, "") else f"`{option.default}`"


def _property(option: Option) -> dict[str, Any]:
    single = _single(option)
    shape = {"type": "array", "items": single} if option.many else single
    described: dict[str, Any] = {"description": option.summary}
    if option.default is not None:
        described["default"] = option.default
    return {**described, **shape}


def _single(option: Option) -> dict[str, Any]:
    if option.choices:
        extra: Sequence[str | int] = () if option.unset_value is None else (option.unset_value,)
        return {"enum": [*option.choices, *extra]}
    if option.kind is Kind.STEPS:
        return {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "number", "minimum": 0, "maximum": 1}, _PERCENTAGE]}
    if option.comma_list:
        return {"type": ["string", "integer", "array"]}
    kinds = {Kind.FLAG: "boolean", Kind.TEXT: "string", Kind.PATH: "string", Kind.INT: "integer", Kind.FLOAT: "number"}
    limits = {"minimum": option.ge, "exclusiveMinimum": option.gt, "maximum": option.le, "exclusiveMaximum": option.lt}
    if option.unset_value is not None and (option.ge is not None or option.gt is not None):
        limits |= {"minimum": option.unset_value, "exclusiveMinimum": None}
    return {"type": kinds[option.kind], **{name: limit for name, limit in limits.items() if limit is not None}}


_PERCENTAGE = {"type": "string", "pattern": "^[0-9.]+%$"}


if __name__ == "__main__":
    write_pages()
