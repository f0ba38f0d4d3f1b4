"""Options about configuration files."""

from typing import ClassVar

from library.options.declare import OptionGroup, PathText, flag, option


class ConfigOptions(OptionGroup):
    """Where option values may come from besides the command line."""

    topic: ClassVar[str] = "Configuration file"

    config_file: PathText = option(
        None, "TOML file with option values; the command line wins over it, and .toml is appended when it is missing."
    )
    output_config: bool = flag("Write the options that differ from their defaults to --config_file and stop.")
    strict_config: bool = flag("Treat unknown keys of the configuration file as errors instead of warnings.")
