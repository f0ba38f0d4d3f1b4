"""What the values of a dataset file's keys may be: each kind of value as a reader and as JSON schema.

Readers are more lenient than the schema: a quoted number is a number to them, while an editor should still point at the quotes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


class NotThatType(ValueError):
    """A value cannot be read as what the key takes; the text says what that is."""


@dataclass(frozen=True)
class ValueType:
    """What a key takes."""

    read: Callable[[Any], Any]
    """Turns the value of the file into the key's type; raises NotThatType."""
    schema: Mapping[str, Any]


def _as_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise NotThatType("true or false")


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise NotThatType("a text in quotes")


def _as_separator(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise NotThatType("a text in quotes of at least one character")


def _as_extension(value: Any) -> str:
    text = _as_text(value)
    return text if text.startswith(".") else f".{text}"


def _as_interpolation(value: Any) -> str:
    if value in INTERPOLATIONS:
        return str(value)
    raise NotThatType("one of " + ", ".join(INTERPOLATIONS))


def _as_table(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise NotThatType("a table, such as { diff_output_preservation = true }")


def _as_resolution(value: Any) -> tuple[int, int]:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers = [_number(part) for part in parts]
    sides = [int(number) for number in numbers if number is not None and number == int(number) and number > 0]
    if len(sides) != len(parts) or len(sides) not in (1, 2):
        raise NotThatType('a side in pixels such as 1024, or width and height such as [832, 1216] or "832,1216"')
    return sides[0], sides[-1]


def _as_factor_range(value: Any) -> tuple[float, float]:
    parts = value.split(",") if isinstance(value, str) else value
    numbers = [_number(part) for part in parts] if isinstance(parts, list | tuple) else []
    match numbers:
        case [float(low), float(high)] if 0 < low <= high:
            return low, high
    raise NotThatType("two numbers above 0 of which the second is not the smaller, such as [2.0, 4.0]")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < 2**53 else None  # rejects nan and inf too


def whole_number(minimum: int | None = None) -> ValueType:
    """Return the type of whole numbers; a quoted number and 8.0 are read as the number."""
    wanted = "a whole number" if minimum is None else f"a whole number of at least {minimum}"

    def read(value: Any) -> int:
        found = _number(value)
        if found is None or found != int(found) or (minimum is not None and found < minimum):
            raise NotThatType(wanted)
        return int(found)

    return ValueType(read, {"type": "integer"} if minimum is None else {"type": "integer", "minimum": minimum})


def number(minimum: float | None = None) -> ValueType:
    """Return the type of numbers, whole ones included."""
    wanted = "a number" if minimum is None else f"a number of at least {minimum:g}"

    def read(value: Any) -> float:
        found = _number(value)
        if found is None or (minimum is not None and found < minimum):
            raise NotThatType(wanted)
        return found

    return ValueType(read, {"type": "number"} if minimum is None else {"type": "number", "minimum": minimum})


def _as_fraction(value: Any) -> float:
    found = _number(value)
    if found is None or not 0 <= found <= 1:
        raise NotThatType("a number from 0 to 1")
    return found


def _as_share(value: Any) -> float:
    found = _number(value)
    if found is None or not 0 <= found < 1:
        raise NotThatType("a number from 0 to below 1: something has to be left to train on")
    return found


_SIDE = {"type": "integer", "minimum": 1}
_PAIR = r"^\s*0*[1-9][0-9]*\s*(,\s*0*[1-9][0-9]*\s*)?$"

BOOL = ValueType(_as_bool, {"type": "boolean"})
TEXT = ValueType(_as_text, {"type": "string"})
SEPARATOR = ValueType(_as_separator, {"type": "string", "minLength": 1})
EXTENSION = ValueType(_as_extension, {"type": "string"})
FRACTION = ValueType(_as_fraction, {"type": "number", "minimum": 0, "maximum": 1})
SHARE = ValueType(_as_share, {"type": "number", "minimum": 0, "exclusiveMaximum": 1})
"""A part, but never all."""
INTERPOLATION = ValueType(_as_interpolation, {"enum": list(INTERPOLATIONS)})
TABLE = ValueType(_as_table, {"type": "object"})
RESOLUTION = ValueType(
    _as_resolution,
    {"anyOf": [_SIDE, {"type": "array", "items": _SIDE, "minItems": 1, "maxItems": 2}, {"type": "string", "pattern": _PAIR}]},
)
FACTOR_RANGE = ValueType(
    _as_factor_range, {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 2, "maxItems": 2}
)
