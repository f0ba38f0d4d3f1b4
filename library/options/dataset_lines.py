"""In which lines of a dataset file its tables and keys stand, which the parsers of TOML and JSON do not say."""

import json
import re
from collections.abc import Iterator, Mapping

from library.options.dataset_keys import DATASET, GENERAL

HEADER = ""
"""Stands for the line in which a table begins."""

_HEADER = re.compile(r"\s*\[\[?\s*([A-Za-z0-9_.\s-]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*["']?([A-Za-z0-9_$-]+)["']?\s*=""")
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],]|[^\s{}\[\],:"]+')


def table_lines(text: str) -> Mapping[str, Mapping[str, int]]:
    """Return the line (from 1) of each key by the table it stands in, for tables that have a header of their own.

    Args:
        text: a valid TOML file. Tables are named as in messages: `[general]`, `[[datasets]] 1`, `[[datasets]] 1, subset 2`.
    """
    found: dict[str, dict[str, int]] = {}
    dataset, subset = 0, 0
    current: dict[str, int] | None = None
    for number, line in _outside_of_texts(text):
        header, key = _HEADER.match(line), _KEY.match(line)
        if header:
            name, inner = _table_and_key(header[1])
            if name == "datasets" and not inner:
                dataset, subset = dataset + 1, 0
            subset += name == "datasets.subsets" and not inner
            where = {"general": GENERAL, "datasets": _dataset(dataset)}.get(name, _subset(dataset, subset))
            table = found.setdefault(where, {HEADER: number}) if name else {}
            table.setdefault(inner, number)
            current = None if inner else table
        elif key and current is not None:
            current.setdefault(key[1], number)
    return found


def _table_and_key(header: str) -> tuple[str, str]:
    """Split a header such as `datasets.subsets.custom_attributes` into the table and the key whose value it begins."""
    name = re.sub(r"\s", "", header)
    for table in ("datasets.subsets", "datasets", "general"):
        if name == table or name.startswith(f"{table}."):
            return table, name[len(table) + 1 :].partition(".")[0]
    return "", name


def _outside_of_texts(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that do not lie within a text of several lines."""
    inside = None
    for number, line in enumerate(text.split("\n"), start=1):
        if inside is None:
            yield number, line
        for delimiter in ('"""', "'''"):
            if inside in (None, delimiter) and line.count(delimiter) % 2:
                inside = None if inside else delimiter


def json_table_lines(text: str) -> Mapping[str, Mapping[str, int]]:
    """Return the line (from 1) of each key by the table it stands in.

    Args:
        text: a valid JSON file. Tables are named as those of TOML files.
    """
    found: dict[str, dict[str, int]] = {}
    for path, line in _json_places(text):
        match path:
            case ["datasets", int(dataset), "subsets", int(subset), *inner]:
                where = _subset(dataset + 1, subset + 1)
            case ["datasets", int(dataset), *inner]:
                where = _dataset(dataset + 1)
            case ["general", *inner]:
                where = GENERAL
            case _:
                continue
        if len(inner) < 2:
            found.setdefault(where, {})[str(inner[0]) if inner else HEADER] = line
    return found


def _json_places(text: str) -> Iterator[tuple[list[str | int | None], int]]:
    """Yield where each key and each object begins, as the keys and the places in lists (from 0) that lead there, and its line."""
    path: list[str | int | None] = []  # None stands for a key that is still to come
    line, before = 1, 0
    for token in _JSON_TOKEN.finditer(text):
        line, before = line + text.count("\n", before, token.start()), token.start()
        match token[0]:
            case "}" | "]":
                path.pop()
            case ",":
                last = path.pop()
                path.append(last + 1 if isinstance(last, int) else None)
            case key if path and path[-1] is None:
                path[-1] = json.loads(key)
                yield [*path], line
            case "{":
                yield [*path], line
                path.append(None)
            case "[":
                path.append(0)


def _dataset(number: int) -> str:
    return f"{DATASET} {number}"


def _subset(dataset: int, number: int) -> str:
    return f"{_dataset(dataset)}, subset {number}"
