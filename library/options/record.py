"""An option as data: what parser, configuration files, documentation and schema read from its declaration."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from library.options.declare import CommaList, LocalPath, OptionGroup, SameAsUnset, Secret
from library.options.scripts import ScriptOptions


class Kind(StrEnum):
    """What one value of an option is."""

    FLAG = "flag"
    TEXT = "text"
    PATH = "path"
    INT = "whole number"
    FLOAT = "number"
    STEPS = "steps or fraction"
    """A whole number of steps, `N%`, or a fraction below 1."""


_KINDS: dict[Any, Kind] = {bool: Kind.FLAG, str: Kind.TEXT, Path: Kind.PATH, int: Kind.INT, float: Kind.FLOAT}


@dataclass(frozen=True)
class Option:
    """One declared option."""

    name: str
    """The flag without dashes, which is also the key in a configuration file."""
    attribute: str
    """The name of its group among the script's options."""
    group: type[OptionGroup]
    kind: Kind
    many: bool
    """Whether it takes any number of values."""
    choices: tuple[str | int, ...] | None
    default: Any
    summary: str
    ge: float | None
    gt: float | None
    le: float | None
    lt: float | None
    unset_value: int | None
    """The value that says the same as leaving the option out."""
    comma_list: bool
    """Whether its text is a list of numbers, which a configuration file may give as numbers."""
    is_path: bool
    """Whether it names a file or folder of this machine."""
    is_secret: bool
    """Whether it is never shown or stored."""

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return f"--{self.name}"

    @property
    def range(self) -> str:
        """The allowed range in words, empty when there is none."""
        low = f"at least {self.ge:g}" if self.ge is not None else f"above {self.gt:g}" if self.gt is not None else ""
        high = f"at most {self.le:g}" if self.le is not None else f"below {self.lt:g}" if self.lt is not None else ""
        return f"{low} and {high}" if low and high else low or high


def options_of(script: type[ScriptOptions]) -> dict[str, Option]:
    """Return the options of a script by name, in the order of its groups."""
    return {
        name: _option(name, attribute, group, info)
        for attribute, group in script.groups().items()
        for name, info in group.model_fields.items()
        if name not in script.lacks
    }


def option_values(options: ScriptOptions) -> dict[str, Any]:
    """Return the value of every option by name."""
    return {
        name: value for attribute in options.groups() for name, value in getattr(options, attribute) if name not in options.lacks
    }


def _option(name: str, attribute: str, group: type[OptionGroup], info: FieldInfo) -> Option:
    value_type, many = _value_type(info.annotation)
    choices = get_args(value_type) if get_origin(value_type) is Literal else None
    marks = {type(mark): mark for mark in info.metadata}
    return Option(
        name=name,
        attribute=attribute,
        group=group,
        kind=_KINDS[type(choices[0])] if choices else _KINDS.get(value_type, Kind.STEPS),
        many=many,
        choices=choices,
        default=info.default,
        summary=info.description or "",
        ge=marks[Ge].ge if Ge in marks else None,
        gt=marks[Gt].gt if Gt in marks else None,
        le=marks[Le].le if Le in marks else None,
        lt=marks[Lt].lt if Lt in marks else None,
        unset_value=marks[SameAsUnset].value if SameAsUnset in marks else None,
        comma_list=CommaList in marks,
        is_path=LocalPath in marks or value_type is Path,
        is_secret=Secret in marks,
    )


def _value_type(annotation: Any) -> tuple[Any, bool]:
    """Return the type of one value, and whether there may be many of them."""
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        annotation = members[0] if len(members) == 1 else annotation
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0], True
    return annotation, False
