"""Which network files a run attaches, with which module and strength; checked before anything heavy is loaded."""

import importlib.util
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from library.options.errors import UsageError
from library.options.groups.generation import GenNetworkOptions
from networks.loading import parse_network_args


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

    Raises:
        UsageError: modules and files do not pair up, a file or module does not exist, or an argument has no `=`; all told together.
    """
    modules, paths = options.network_module or (), options.network_weights or ()
    multipliers, arguments = options.network_mul or (), options.network_args or ()
    problems = [*_count_problems(modules, paths, multipliers, arguments), *_missing(modules, paths)]
    parsed = [_parse_args(text, problems) for text in arguments]
    if problems:
        raise UsageError(problems)
    num_merged = len(paths) if options.network_merge else options.network_merge_n_models or 0
    rows = zip_longest(modules, paths, multipliers, parsed)
    return [
        NetworkFile(module, path, 1.0 if multiplier is None else multiplier, args or {}, merge=i < num_merged)
        for i, (module, path, multiplier, args) in enumerate(rows)
    ]


def _count_problems(
    modules: tuple[str, ...], paths: tuple[str, ...], multipliers: tuple[float, ...], arguments: tuple[str, ...]
) -> list[str]:
    problems = []
    if len(modules) != len(paths):
        problems.append(
            f"--network_module has {len(modules)} names and --network_weights {len(paths)} files; give one module per file, "
            "for example --network_module networks.lora --network_weights my.safetensors."
        )
    for option, given in (("--network_mul", multipliers), ("--network_args", arguments)):
        if len(given) > len(paths):
            problems.append(
                f"{option} has {len(given)} entries for {len(paths)} files of --network_weights; give at most one per file."
            )
    return problems


def _missing(modules: tuple[str, ...], paths: tuple[str, ...]) -> list[str]:
    absent = [f"--network_weights {path}: there is no such file; check the path." for path in paths if not Path(path).is_file()]
    unknown = [
        f"--network_module {module}: there is no such module; networks.lora is the usual one, and lycoris.kohya comes with "
        "`pip install lycoris-lora`."
        for module in modules
        if not _module_exists(module)
    ]
    return absent + unknown


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
