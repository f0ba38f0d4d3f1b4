"""The TOML files of `--config_file` and `--output_config`."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.options.errors import UsageError

NOT_WRITTEN = frozenset({"config_file", "output_config", "strict_config"})
"""Options about such files themselves, which are not written into one."""


@dataclass(frozen=True)
class FileValue:
    """A value and where it stands."""

    value: Any
    where: str


def config_path(name: str) -> Path:
    """Return the path that `--config_file` names, with `.toml` appended when it does not end so."""
    return Path(name if name.endswith(".toml") else f"{name}.toml")


def read_config_file(path: Path) -> dict[str, FileValue]:
    """Read the values of a configuration file.

    Tables are for the reader's eye: their keys count as if they stood at the top. A later table wins over an earlier one.

    Raises:
        UsageError: the file is missing, unreadable, not UTF-8 or not valid TOML.
    """
    values: dict[str, FileValue] = {}
    for key, value in _read_toml(path).items():
        if isinstance(value, dict):
            values |= {inner: FileValue(each, f"{inner} in [{key}] of {path}") for inner, each in value.items()}
        else:
            values[key] = FileValue(value, f"{key} in {path}")
    return values


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError([f"--config_file: there is no file {path}."]) from None
    except UnicodeDecodeError as error:
        raise UsageError([f"--config_file: {path} is not UTF-8 (byte {error.start}). Save it as UTF-8."]) from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError([f"--config_file: {path} is not valid TOML: {error}."]) from None
    except OSError as error:
        raise UsageError([f"--config_file: {path} cannot be read: {error.strerror}."]) from None


def write_config_file(path: Path, values: Mapping[str, Any]) -> None:
    """Write option values, among which there is no secret, to a new file; those of `NOT_WRITTEN` are left out.

    Raises:
        UsageError: the file exists or cannot be made.
    """
    import toml

    plain = {name: _plain(value) for name, value in values.items() if name not in NOT_WRITTEN}
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(toml.dumps(plain))
    except FileExistsError:
        raise UsageError(
            [f"--output_config: {path} exists already and is not overwritten. Choose another --config_file."]
        ) from None
    except OSError as error:
        raise UsageError([f"--output_config: {path} cannot be written: {error.strerror}."]) from None


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
