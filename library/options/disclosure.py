"""What of a run's options others may see: no secrets anywhere, no paths where other people read."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.options.record import Option, option_values, options_of
from library.options.scripts import ScriptOptions, TrainingOptions

logger = logging.getLogger(__name__)

HIDDEN = "***"
"""Stands where a secret was typed."""

_ABSOLUTE = re.compile(r"(?:^|[\s=,'\"])(?:/|~/|[A-Za-z]:[\\/])")
"""An absolute path, alone or inside a longer text such as `key=/home/me/file`."""


def loggable_config(options: ScriptOptions) -> dict[str, Any]:
    """Return the options to store with a tracker, by name; lists and tables as text.

    Left out are secrets, options that name files or folders, and any other text with an absolute path in it.
    """
    declared = options_of(type(options))
    values = {name: _as_plain(value) for name, value in option_values(options).items()}
    return {name: value for name, value in values.items() if not _is_private(declared[name], value)}


def options_without_secrets(options: ScriptOptions) -> dict[str, Any]:
    """Return every option by name for a record on this machine; of a secret, whether there is one."""
    declared = options_of(type(options))
    return {
        name: HIDDEN if declared[name].is_secret and value is not None else value for name, value in option_values(options).items()
    }


def command_without_secrets(script: type[ScriptOptions], argv: Sequence[str]) -> list[str]:
    """Return a command line with secrets made unreadable, however they were typed.

    Args:
        script: whose options they are.
        argv: the arguments without the script's name.
    """
    secrets = [option.name for option in options_of(script).values() if option.is_secret]
    shown: list[str] = []
    follows_secret = False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_secret = name.startswith("--") and any(secret.startswith(name[2:]) for secret in secrets)
        if is_secret and equals:
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(HIDDEN if follows_secret and not word.startswith("--") else word)
        follows_secret = is_secret and not equals
    return shown


def tell_disclosures(options: ScriptOptions, typed: Mapping[str, Sequence[str]]) -> None:
    """Say what the command line shows to everyone who sees the run on Weights & Biases, which stores it.

    Args:
        options: of the run.
        typed: the texts of each option on the command line, by name; a configuration file shows nothing.
    """
    if not isinstance(options, TrainingOptions) or options.logging.log_with not in ("wandb", "all"):
        return
    declared = options_of(type(options))
    secrets = [declared[name].flag for name in typed if declared[name].is_secret]
    if secrets:
        logger.warning(
            "wandb stores the command line, and %s is on it for everyone who sees the run; put it in a --config_file.",
            " and ".join(secrets),
        )
    paths = [
        declared[name].flag
        for name, texts in typed.items()
        if name == "config_file" or (declared[name].is_path and any(Path(text).is_absolute() for text in texts))
    ]
    if "huggingface_repo_id" in typed and options.hub.huggingface_repo_visibility != "public":
        paths.append("--huggingface_repo_id")
    if paths:
        logger.info("wandb stores the command line; names of yours are on it: %s.", ", ".join(paths))


def _is_private(option: Option, value: Any) -> bool:
    return option.is_secret or option.is_path or (isinstance(value, str) and _ABSOLUTE.search(value) is not None)


def _as_plain(value: Any) -> bool | int | float | str | None:
    return value if isinstance(value, bool | int | float | str | None) else str(value)
