"""The text of `--help`."""

import argparse
from typing import Any

from library.options.not_built import NOT_BUILT
from library.options.record import Kind, Option, options_of
from library.options.scripts import ScriptOptions

_METAVARS = {Kind.TEXT: "TEXT", Kind.PATH: "PATH", Kind.INT: "N", Kind.FLOAT: "X", Kind.STEPS: "N|N%"}


def help_text(script: type[ScriptOptions]) -> str:
    """Return the help of a script: its options by topic, with defaults."""
    parser = argparse.ArgumentParser(prog=script.script, description=script.purpose, usage=f"{script.script} [options]")
    headings: dict[str, Any] = {}
    for option in options_of(script).values():
        topic = option.group.topic
        if topic not in headings:
            headings[topic] = parser.add_argument_group(topic)
        headings[topic].add_argument(option.flag, help=_summary(option).replace("%", "%%"), **_shape(option))
    return parser.format_help()


def _shape(option: Option) -> dict[str, Any]:
    if option.kind is Kind.FLAG:
        return {"action": "store_true"}
    metavar = "{" + ",".join(str(choice) for choice in option.choices) + "}" if option.choices else _METAVARS[option.kind]
    return {"metavar": metavar, "nargs": "*" if option.many else None}


def _summary(option: Option) -> str:
    parts = [option.summary]
    if option.name in NOT_BUILT:
        parts.append("(not built yet)")
    elif option.default not in (None, False, ""):
        parts.append(f"(default: {option.default})")
    return " ".join(parts)
