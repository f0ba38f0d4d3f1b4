"""The parser sd-scripts has, built from the frozen table: what our reading of the command line is compared with."""

import argparse
import json
from pathlib import Path

COMPAT = Path(__file__).parents[1] / "compat" / "cli_options.json"


def int_or_float(text):
    if text.endswith("%"):
        return float(text[:-1]) / 100
    number = float(text)
    return int(text) if number >= 1 else number


CONVERTERS = {"str": str, "int": int, "float": float, "Path": Path, "int_or_float": int_or_float, None: None}


class RefusedError(Exception):
    """The reference refuses the command line."""


class Parser(argparse.ArgumentParser):
    """Raises instead of ending the process."""

    def error(self, message):
        raise RefusedError(message)


def reference_parser(script: str) -> Parser:
    """Return sd-scripts' parser of a script."""
    parser = Parser(prog=script)
    for row in json.loads(COMPAT.read_text())[script]:
        if row["kind"] == "store_true":
            parser.add_argument(*row["flags"], action="store_true")
        else:
            extra = {key: row[key] for key in ("nargs", "default", "choices")}
            parser.add_argument(*row["flags"], dest=row["dest"], type=CONVERTERS[row["type"]], **extra)
    return parser
