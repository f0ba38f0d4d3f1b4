"""How an option is declared: one field of an `OptionGroup`, from which flag, TOML key, check and documentation follow."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


class OptionGroup(BaseModel):
    """Options of one topic; immutable, and constructible without arguments.

    A field's name is the flag without its dashes and the key in a configuration file. Direct construction with a value out
    of range raises pydantic's `ValidationError`; `library.options.parse.parse` turns that into a `UsageError`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)

    topic: ClassVar[str]
    """Heading of the group in `--help` and in the documentation."""


def option(
    default: Any,
    summary: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Declare an option.

    Args:
        default: the value when the option is not given; None means unset.
        summary: one sentence for `--help` and the documentation.
        ge: smallest value allowed.
        gt: values must be above this.
        le: largest value allowed.
        lt: values must be below this.
    """
    return Field(default, description=summary, ge=ge, gt=gt, le=le, lt=lt)


def flag(summary: str) -> Any:
    """Declare a switch that is off unless given."""
    return Field(False, description=summary)


@dataclass(frozen=True)
class SameAsUnset:
    """Marks a type of which one value says the same as leaving the option out; that value is read as None.

    Front ends write such values for every option a person did not touch.
    """

    value: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Read `value` as None before the type itself is checked."""
        return core_schema.no_info_before_validator_function(lambda given: None if given == self.value else given, handler(source))


@dataclass(frozen=True)
class CommaList:
    """Marks a text of comma-separated numbers, which a configuration file may also give as a number or an array."""


@dataclass(frozen=True)
class LocalPath:
    """Marks a text that names a file or folder of this machine: nobody else needs to know it."""


@dataclass(frozen=True)
class Secret:
    """Marks a text that is never shown or stored."""


PathText = Annotated[str | None, LocalPath()]
SecretText = Annotated[str | None, Secret()]
