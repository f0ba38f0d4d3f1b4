"""Options about messages on the console."""

from typing import ClassVar, Literal

from library.options.declare import OptionGroup, PathText, flag, option


class ConsoleOptions(OptionGroup):
    """How messages are shown."""

    topic: ClassVar[str] = "Console messages"

    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = option(
        None, "Least important kind of message that is shown; INFO when left out."
    )
    console_log_file: PathText = option(None, "Write messages to this file, which is overwritten, instead of the console.")
    console_log_simple: bool = flag("Write plain lines to standard output instead of coloured ones to standard error.")
