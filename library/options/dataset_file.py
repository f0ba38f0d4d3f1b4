"""Read a dataset file into tables and find every key that is unknown, misplaced or of the wrong type."""

import json
import os
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from library.options.dataset_keys import DATASET, GENERAL, KEYS, RENAMED, SUBSET, subset_kind
from library.options.dataset_lines import HEADER, json_table_lines, table_lines
from library.options.dataset_values import NotThatType
from library.options.errors import UsageError
from library.options.nearest import did_you_mean, nearest
from library.options.not_built import NOT_BUILT_DATASET_KEYS
from library.options.record import options_of
from library.options.scripts import SCRIPTS

Table = Mapping[str, Any]
Lines = Mapping[str, Mapping[str, int]]
"""The line of each key, by table."""


@dataclass(frozen=True)
class Place:
    """A table and the words for where it is."""

    source: str
    """The file, or an option."""
    where: str
    """The table in the file; empty for an option."""
    table: Table
    lines: Mapping[str, int] = field(default_factory=dict)
    """The lines in which its keys stand, where they are known."""

    def at(self, key: str = HEADER) -> str:
        """Return where a key stands, or the table that lacks it, for the head of a message."""
        line = self.lines.get(key, self.lines.get(HEADER))
        source = self.source if line is None else f"{self.source}, line {line}"
        return f"{source}: {self.where}" if self.where else source


@dataclass(frozen=True)
class DatasetTables:
    """One dataset of the file."""

    own: Place
    subsets: list[Place]


@dataclass
class DatasetFile:
    """The tables of a file and what is wrong with their keys; values are still as they were written."""

    general: Place
    datasets: list[DatasetTables] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_dataset_file(path: str) -> DatasetFile:
    """Read a `.toml` or `.json` dataset file and check its keys.

    Raises:
        UsageError: the file is missing, has another ending, is not UTF-8 or not valid TOML or JSON.
    """
    content, lines = _parsed(path)
    tables = DatasetFile(Place(path, GENERAL, {}))
    tables.problems += [f"{path}: {_unknown_top_level(name)}" for name in content if name not in ("general", "datasets", "$schema")]
    general = content.get("general") or {}
    if isinstance(general, dict):
        tables.general = _place(path, GENERAL, general, lines)
        tables.problems += _complaints(tables.general, GENERAL)
    else:
        tables.problems.append(f"{path}: {GENERAL} must be a table, but it is {_as_written(general)}.")
    for number, table in enumerate(_list_of_tables(path, content.get("datasets"), DATASET, tables.problems), start=1):
        tables.datasets.append(_dataset_tables(path, table, f"{DATASET} {number}", lines, tables.problems))
    return tables


def _dataset_tables(path: str, table: Table, where: str, lines: Lines, problems: list[str]) -> DatasetTables:
    own = _place(path, where, {name: value for name, value in table.items() if name != "subsets"}, lines)
    problems += _complaints(own, DATASET)
    subsets = _list_of_tables(path, table.get("subsets"), f"[[datasets.subsets]] of {where}", problems)
    places = [_place(path, f"{where}, subset {number}", subset, lines) for number, subset in enumerate(subsets, start=1)]
    for place in places:
        problems += _complaints(place, SUBSET)
    problems += _kind_complaints(own, places)
    return DatasetTables(own, places)


def _place(path: str, where: str, table: Table, lines: Lines) -> Place:
    """Put a table in its place; lines are left out where they are not those of just these keys."""
    found = lines.get(where, {})
    return Place(path, where, table, found if found.keys() - {HEADER, "subsets"} == table.keys() else {})


def _kind_complaints(own: Place, subsets: Sequence[Place]) -> Iterator[str]:
    """Complain about subsets that do not go together, and about keys that say nothing about the images of a dataset."""
    counts = Counter(subset_kind(subset.table) for subset in subsets)
    if len(counts) > 1:
        found = " and ".join(f"{count} with {kind}" for kind, count in sorted(counts.items()))
        yield f"{own.at()} mixes subsets, {found}. Give each kind a [[datasets]] of its own."
        return
    for kind in counts:
        for level, place in ((DATASET, own), *((SUBSET, subset) for subset in subsets)):
            written = [KEYS[name] for name, value in place.table.items() if name in KEYS and value is not None]
            for key in written:
                if kind not in key.kinds and level in key.levels:
                    suitable = " or ".join(sorted(key.kinds))
                    yield f"{place.at(key.name)}: {key.name} is for subsets with {suitable}; these have {kind}. Remove it."


def _parsed(path: str) -> tuple[dict[str, Any], Lines]:
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".toml", ".json"):
        raise UsageError([f"--dataset_config {path}: the name must end in .toml or .json."])
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        content = tomllib.loads(text) if ending == ".toml" else json.loads(text)
    except FileNotFoundError:
        raise UsageError([f"--dataset_config {path}: there is no such file. Paths start at {os.getcwd()}."]) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            [f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}). Save it as UTF-8."]
        ) from None
    except OSError as error:
        raise UsageError([f"--dataset_config {path} cannot be read: {error.strerror}."]) from None
    except ValueError as error:
        raise UsageError([f"{path} is not valid {ending[1:].upper()}: {error}.{_backslash_hint(str(error))}"]) from None
    if not isinstance(content, dict):
        raise UsageError([f"{path} must hold a general table and a list of datasets, but it holds a {type(content).__name__}."])
    return content, table_lines(text) if ending == ".toml" else json_table_lines(text)


def _backslash_hint(error: str) -> str:
    if "escape" in error.lower() or "backslash" in error.lower() or "hex value" in error.lower():
        return " Write Windows paths in single quotes, or with forward slashes."
    return ""


def _list_of_tables(path: str, value: Any, where: str, problems: list[str]) -> list[dict[str, Any]]:
    if isinstance(value, list) and value and all(isinstance(table, dict) for table in value):
        return value
    if value is None or value == []:
        problems.append(f"{path}: {where} is missing. Write at least one [[datasets]] with one [[datasets.subsets]] below it.")
    else:
        problems.append(f"{path}: {where} must be a list of tables; in TOML its name stands in double brackets.")
    return []


def _complaints(place: Place, level: str) -> list[str]:
    complaints = ((name, _key_complaint(name, value, level)) for name, value in place.table.items())
    return [f"{place.at(name)}: {complaint}" for name, complaint in complaints if complaint]


def _key_complaint(name: str, value: Any, level: str) -> str | None:
    if name in NOT_BUILT_DATASET_KEYS:
        reason, harmless = NOT_BUILT_DATASET_KEYS[name]
        if value is not None and value not in harmless:
            return f"{name} cannot be used: {reason}. Remove the key."
    key = KEYS.get(name)
    if key is None:
        return _unknown_key(name)
    if level not in key.levels:
        return f"{name} does not belong in {level}. Put it in {' or '.join(key.levels)}."
    if value is None:
        return None
    try:
        key.type.read(value)
    except NotThatType as error:
        return f"{name} must be {error}, but it is {_as_written(value)}."
    return None


def _as_written(value: Any) -> str:
    """Spell a value as files do: true, not True."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _unknown_key(name: str) -> str:
    if name in RENAMED:
        return f"{name} is called {RENAMED[name]} in a dataset file."
    if any(name in options_of(script) for script in SCRIPTS):
        return f"{name} is a setting of the whole run: give --{name} on the command line or in --config_file."
    near = nearest(name, KEYS)
    if near is None:
        return f"unknown key {name}. Remove it."
    return f"unknown key {name}. Did you mean {near}? It is allowed in {' or '.join(KEYS[near].levels)}."


def _unknown_top_level(name: str) -> str:
    if name in KEYS:
        return f"{name} stands outside any table. Put it in {' or '.join(KEYS[name].levels)}."
    hint = did_you_mean(name, ("general", "datasets"))
    return f"unknown table or key {name}. A dataset file holds {GENERAL} and {DATASET}.{hint}"
