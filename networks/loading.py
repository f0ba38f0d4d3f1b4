"""Find the network module a run asks for, ours or a third party's, and read its arguments."""

import importlib
import importlib.util
from collections.abc import Sequence
from difflib import get_close_matches
from types import ModuleType

from library.options.errors import UsageError

_PIP_NAMES = {"lycoris": "lycoris_lora"}
_OWN_MODULES = ("networks.lora",)


def import_network_module(name: str) -> ModuleType:
    """Import a network module such as `networks.lora` or `lycoris.kohya`.

    Args:
        name: a Python module that has `create_network` and `create_network_from_weights`.

    Raises:
        UsageError: there is no such module, a package it needs is missing, or it is no network module.
    """
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError([_missing_module(name, error)]) from error
    if not hasattr(module, "create_network"):
        raise UsageError([f"--network_module {name} is not a network module: it has no create_network. {_known_modules(name)}"])
    return module


def check_network_module(name: str) -> None:
    """Find out whether a network module exists, without importing it. Of another package only its presence is looked at.

    Raises:
        UsageError: there is no such module, or the package it is in is not installed.
    """
    package = name.partition(".")[0]
    looked_for = name if package == "networks" else package  # finding a package's inside would import it
    if importlib.util.find_spec(looked_for) is None:
        raise UsageError([_missing_module(name, ModuleNotFoundError(name=looked_for))])


def parse_network_args(pairs: Sequence[str] | None) -> dict[str, str]:
    """Split `key=value` pairs at the first `=`; of a key given twice, the last counts.

    Raises:
        UsageError: pairs without `=` or without a key, all told together.
    """
    given = list(pairs or ())
    wrong = [pair for pair in given if not pair.partition("=")[0].strip() or "=" not in pair]
    if wrong:
        raise UsageError([f"--network_args {pair!r} is not of the form key=value, for example conv_dim=8." for pair in wrong])
    return {pair.partition("=")[0].strip(): pair.partition("=")[2].strip() for pair in given}


def _missing_module(name: str, error: ModuleNotFoundError) -> str:
    package = name.partition(".")[0]
    if error.name == package and package in _PIP_NAMES:
        return f"--network_module {name} needs a package that is not installed: `pip install {_PIP_NAMES[package]}`."
    if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
        return f"--network_module {name} does not exist: Python finds no module {error.name}. {_known_modules(name)}"
    return f"--network_module {name} needs the module {error.name}, which is not installed: `pip install {error.name}`."


def _known_modules(name: str) -> str:
    close = get_close_matches(name, [*_OWN_MODULES, "lycoris.kohya"], n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    return f"{hint}This suite has {', '.join(_OWN_MODULES)}; lycoris.kohya comes with `pip install {_PIP_NAMES['lycoris']}`."
