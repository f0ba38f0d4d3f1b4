"""From what was typed, or stands in a configuration file, to the value of an option."""

import json
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from library.options.nearest import did_you_mean
from library.options.record import Kind, Option


class Unsuitable(ValueError):
    """A value that cannot be the option's; the text says what is wrong with it: "is not a number."."""


def typed_value(option: Option, texts: Sequence[str]) -> Any:
    """Convert the values typed after a flag.

    Args:
        option: which option.
        texts: one text, or any number where the option takes many; none for a switch.

    Raises:
        Unsuitable: a text cannot be read as the option's type or is not among its choices.
    """
    if option.kind is Kind.FLAG:
        return True
    if option.many:
        return tuple(_from_text(option, text) for text in texts)
    if texts[0] == "" and option.default is None and option.kind in (Kind.TEXT, Kind.PATH) and not option.choices:
        return None  # `--vae "$VAE"` with an empty variable means no VAE
    return _from_text(option, texts[0])


def file_value(option: Option, value: Any) -> Any:
    """Convert the value of a key in a configuration file.

    A value of another type is taken where it has only one reading: `"1"` for 1, `1.0` for 1, `1024` for `"1024"`, one value for
    a list, an empty text for an option that is left out.

    Raises:
        Unsuitable: there is no reading of the value, or more than one.
    """
    if option.default is None and value == "":
        return None
    if option.many:
        return _list_from_file(option, value)
    if option.comma_list and isinstance(value, list):
        return ",".join(_from_file(option, number) for number in value)
    return _from_file(option, value)


def _list_from_file(option: Option, value: Any) -> tuple[Any, ...]:
    if isinstance(value, list):
        return tuple(_from_file(option, item) for item in value)
    if isinstance(value, str) and len(value.split()) > 1:
        raise Unsuitable("could be one value or several. Write an array such as " + json.dumps(value.split()) + ".")
    return (_from_file(option, value),)


def _from_text(option: Option, text: str) -> Any:
    return _checked(option, _TEXT_READERS[option.kind](text))


def _from_file(option: Option, value: Any) -> Any:
    if isinstance(value, str) and option.kind is not Kind.FLAG:
        return _from_text(option, value)
    return _checked(option, _FILE_READERS[option.kind](value))


def _checked(option: Option, value: Any) -> Any:
    if value == option.unset_value and option.kind is not Kind.FLAG:
        return None
    if option.choices is not None and value not in option.choices:
        choices = [str(choice) for choice in option.choices]
        raise Unsuitable(f"is not one of {', '.join(choices)}.{did_you_mean(str(value), choices)}")
    limits = ((option.ge, operator.ge), (option.gt, operator.gt), (option.le, operator.le), (option.lt, operator.lt))
    if any(limit is not None and not holds(value, limit) for limit, holds in limits):
        raise Unsuitable(f"is out of range. It must be {option.range}.")
    return value


def _int_text(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Unsuitable("is not a whole number.") from None


def _float_text(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise Unsuitable("is not a number.") from None
    if not math.isfinite(number):
        raise Unsuitable("is not a finite number.")
    return number


def _steps_text(text: str) -> int | float:
    """Read a whole number of steps, a fraction below 1, or `N%`."""
    wanted = Unsuitable("is not a whole number of steps, a fraction below 1, or a percentage such as 10%.")
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        number = float(text)
        return int(text) if number >= 1 else number
    except ValueError:
        raise wanted from None


def _flag_value(value: Any) -> bool:
    readings = {"true": True, "false": False, "1": True, "0": False}
    if str(value).lower() in readings and not isinstance(value, float):
        return readings[str(value).lower()]
    raise Unsuitable("is not true or false.")


def _int_value(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise Unsuitable("is not a whole number.")
    return int(value)


def _float_value(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unsuitable("is not a number.")
    return float(value)


def _steps_value(value: Any) -> int | float:
    """A float up to 1 is a fraction of the run; above it only a whole number makes sense."""
    if isinstance(value, bool) or not isinstance(value, int | float) or (value > 1 and not float(value).is_integer()):
        raise Unsuitable("is not a whole number of steps, a fraction up to 1.0, or a percentage in quotes.")
    return int(value) if value > 1 else value


def _text_value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unsuitable("is not a text in quotes.")
    return str(value)


def _path_value(value: Any) -> Path:
    raise Unsuitable("is not a path in quotes.")


_TEXT_READERS: dict[Kind, Callable[[str], Any]] = {
    Kind.TEXT: str,
    Kind.PATH: Path,
    Kind.INT: _int_text,
    Kind.FLOAT: _float_text,
    Kind.STEPS: _steps_text,
}
_FILE_READERS: dict[Kind, Callable[[Any], Any]] = {
    Kind.FLAG: _flag_value,
    Kind.TEXT: _text_value,
    Kind.PATH: _path_value,
    Kind.INT: _int_value,
    Kind.FLOAT: _float_value,
    Kind.STEPS: _steps_value,
}
