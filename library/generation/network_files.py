"""Which network files a run attaches, with which module and strength; checked before anything heavy is loaded."""

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from library.options.errors import UsageError
from library.options.groups.generation import GenNetworkOptions
from networks.loading import parse_network_args

Value = TypeVar("Value")


@dataclass(frozen=True)
class NetworkFile:
    """One network to attach."""

    module: str
    """Python module that knows the network's kind, for example `networks.lora`."""
    path: str
    multiplier: float
    args: dict[str, str]
    """What `--network_args` hands to the module, as text."""
    merge: bool
    """Add it to the model's weights once, instead of running it beside them."""

    @property
    def name(self) -> str:
        """The file's name without folder and ending."""
        return Path(self.path).stem


def planned_networks(options: GenNetworkOptions) -> list[NetworkFile]:
    """Return the networks in the order of the command line.

    Args:
        options: checked, so that there is one module per file.

    Raises:
        UsageError: a file or module does not exist, or an argument has no `=`; all told together.
    """
    modules, paths = options.network_module or (), options.network_weights or ()
    problems = [*_missing(modules, paths)]
    arguments = [_parse_args(text, problems) for text in options.network_args or ()]
    if problems:
        raise UsageError(problems)
    num_merged = len(paths) if options.network_merge else options.network_merge_n_models or 0
    return [
        NetworkFile(module, path, nth_or(options.network_mul or (), i, 1.0), nth_or(arguments, i, {}), merge=i < num_merged)
        for i, (module, path) in enumerate(zip(modules, paths, strict=False))
    ]


def nth_or(values: Sequence[Value], index: int, default: Value) -> Value:
    """Return the value at a position, or the default where the list is shorter."""
    return values[index] if index < len(values) else default


def _missing(modules: Iterable[str], paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        if not Path(path).is_file():
            yield f"--network_weights {path}: there is no such file; check the path."
    for module in modules:
        if not _module_exists(module):
            yield (
                f"--network_module {module}: there is no such module; networks.lora is the usual one, and lycoris.kohya comes with "
                "`pip install lycoris_lora`."
            )


def _module_exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _parse_args(text: str, problems: list[str]) -> dict[str, str]:
    """Read `key=value;key=value`."""
    try:
        return parse_network_args([pair for pair in text.split(";") if pair.strip()])
    except UsageError as error:
        problems.extend(error.problems)
        return {}
