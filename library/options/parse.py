"""From a command line to a script's options, or to the complete list of what is wrong with it."""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from library.options.checks import find_notes, find_problems
from library.options.command_line import scan
from library.options.config_file import FileValue, config_path, read_config_file, write_config_file
from library.options.declare import OptionGroup
from library.options.disclosure import tell_disclosures
from library.options.effects import effective_options
from library.options.elsewhere import names_elsewhere
from library.options.errors import UsageError
from library.options.launcher import deepspeed_settings, launcher_problems
from library.options.nearest import did_you_mean
from library.options.not_built import not_built_problems
from library.options.record import Option, options_of
from library.options.scripts import ScriptOptions
from library.options.values import Unsuitable, file_value, typed_value

logger = logging.getLogger(__name__)

Script = TypeVar("Script", bound=ScriptOptions)


@dataclass(frozen=True)
class _Given:
    """The value of one option that was given, and where it stands."""

    value: Any
    where: str


def parse(script: type[Script], argv: Sequence[str], further_problems: Callable[[Script], Iterable[str]] | None = None) -> Script:
    """Read the command line, and the configuration file it names, into options.

    What was typed wins over the configuration file, which wins over what accelerate was told of DeepSpeed, which wins over the
    defaults. Unknown keys of the file and other oddities are logged. With `--help` the help is shown, with `--output_config` the
    file is written, and `SystemExit(0)` follows.

    Args:
        script: the script's options class.
        argv: the arguments, without the script's name.
        further_problems: says what else is wrong with the options, such as with files they name, so that it is told together;
            values that could not be read stand at their defaults then.

    Raises:
        UsageError: with every mistake: unknown options, values that cannot be read or are out of range, combinations that
            exclude each other, features that are not built yet.
    """
    options = options_of(script)
    line = scan(argv, options, names_elsewhere(script), script.additions)
    if line.wants_help:
        _show_help(script)
    given, problems = _read_typed(options, line.typed)
    problems = line.problems + problems
    if "output_config" in line.typed:
        _write_file(given, problems, options)
    if "config_file" in given:
        in_file, file_problems = _read_file(script, given)
        given = in_file | given
        problems += file_problems
    launched, launcher_said = _read_launcher(options, given)
    given = launched | given
    problems += launcher_said
    changed = {name: each for name, each in given.items() if each.value != options[name].default}
    problems += not_built_problems(((name, each.where) for name, each in changed.items()), effective_options(script))
    parsed = script(**_build_groups(script, given, problems))
    problems += _not_told_before(find_problems(parsed), problems)
    if further_problems is not None:
        problems += _not_told_before(list(further_problems(parsed)), problems)
    if problems:
        raise UsageError(problems)
    _tell_notes(script, parsed, changed)
    tell_disclosures(parsed, line.typed)
    return parsed


def _show_help(script: type[ScriptOptions]) -> None:
    from library.options.help import help_text

    try:
        sys.stdout.write(help_text(script))
        sys.stdout.flush()
    except BrokenPipeError:  # `--help | head`
        sys.stderr.close()
    raise SystemExit(0)


def _read_typed(options: Mapping[str, Option], typed: Mapping[str, tuple[str, ...]]) -> tuple[dict[str, _Given], list[str]]:
    given: dict[str, _Given] = {}
    problems: list[str] = []
    for name, texts in typed.items():
        option = options[name]
        try:
            given[name] = _Given(typed_value(option, texts), option.flag)
        except Unsuitable as reason:
            problems.append(f"{option.flag}: {' '.join(texts)!r} {reason}")
    return given, problems


def _read_file(script: type[ScriptOptions], typed: Mapping[str, _Given]) -> tuple[dict[str, _Given], list[str]]:
    """Read the configuration file that was named; unknown keys are problems only with `--strict_config`."""
    options = options_of(script)
    try:
        in_file = read_config_file(config_path(typed["config_file"].value))
    except UsageError as error:
        return {}, list(error.problems)
    given: dict[str, _Given] = {}
    problems: list[str] = []
    for name in in_file.keys() & options.keys():
        entry = in_file[name]
        try:
            given[name] = _Given(file_value(options[name], entry.value), entry.where)
        except Unsuitable as reason:
            problems.append(f"{entry.where}: {entry.value!r} {reason}")
    unknown = _unknown_keys(script, in_file)
    strict = typed.get("strict_config") or given.get("strict_config")
    if strict is not None and strict.value:
        problems += unknown
    else:
        for sentence in unknown:
            logger.warning("%s It is ignored.", sentence)
    return given, problems


def _read_launcher(options: Mapping[str, Option], given: Mapping[str, _Given]) -> tuple[dict[str, _Given], list[str]]:
    """Read what accelerate's configuration says of DeepSpeed, in scripts that have it; a warning tells where others win."""
    if "deepspeed" not in options:
        return {}, []
    launched: dict[str, _Given] = {}
    problems = list(launcher_problems(os.environ))
    for name, (text, where) in deepspeed_settings(os.environ).items():
        try:
            launched[name] = _Given(typed_value(options[name], [text]), where)
        except Unsuitable as reason:
            problems.append(f"{where}: {text!r} {reason}")
            continue
        if name in given and given[name].value != launched[name].value:
            logger.warning("%s is %s, and %s %s wins.", where, text, given[name].where, given[name].value)
    return launched, problems


def _unknown_keys(script: type[ScriptOptions], in_file: Mapping[str, FileValue]) -> list[str]:
    """Complain about keys that no script knows; keys of other scripts are only noted, as front ends write them for all."""
    options = options_of(script)
    elsewhere = names_elsewhere(script)
    foreign = sorted(in_file.keys() & elsewhere)
    if foreign:
        logger.info("Keys of the configuration file that are for other scripts: %s", ", ".join(foreign))
    unknown = [(name, entry) for name, entry in in_file.items() if name not in options and name not in elsewhere]
    return [f"{entry.where} is not an option.{did_you_mean(name, options)}" for name, entry in unknown]


def _write_file(given: Mapping[str, _Given], problems: Sequence[str], options: Mapping[str, Option]) -> None:
    if "config_file" not in given:
        problems = [*problems, "--output_config needs --config_file, the name of the file to write."]
    if problems:
        raise UsageError(problems)
    path = config_path(given["config_file"].value)
    changed = {name: each.value for name, each in given.items() if each.value != options[name].default}
    write_config_file(path, {name: value for name, value in changed.items() if not options[name].is_secret})
    logger.info("Wrote the options to %s; secrets are left out.", path)
    raise SystemExit(0)


def _build_groups(script: type[ScriptOptions], given: Mapping[str, _Given], problems: list[str]) -> dict[str, OptionGroup]:
    """Build every group; a value its group refuses is added to `problems` and left at its default."""
    options = options_of(script)
    groups: dict[str, OptionGroup] = {}
    for attribute, group in script.groups().items():
        values = {name: each.value for name, each in given.items() if options[name].attribute == attribute}
        try:
            groups[attribute] = group(**values)
        except ValidationError as error:
            for detail in error.errors():
                name = str(detail["loc"][0])
                reason = detail.get("ctx", {}).get("error", detail["msg"])
                problems.append(f"{given[name].where}: {values.pop(name)!r} is not usable: {reason}.")
            groups[attribute] = group(**values)
    return groups


def _not_told_before(problems: Sequence[str], told: Sequence[str]) -> list[str]:
    """Leave out problems that only follow from others, because they are about the same option."""
    named = set(re.findall(r"--(\w+)", " ".join(told)))
    return [problem for problem in problems if not named & set(re.findall(r"--(\w+)", problem))]


def _tell_notes(script: type[ScriptOptions], parsed: ScriptOptions, changed: Mapping[str, _Given]) -> None:
    for note in find_notes(parsed):
        logger.warning(note)
    idle = sorted(changed.keys() - effective_options(script))
    if idle:
        logger.info("Options for training that do nothing in %s: %s", script.script, ", ".join(idle))
