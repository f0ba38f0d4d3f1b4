"""Options about knowing what a run will need before it begins."""

import re
from typing import ClassVar

from pydantic import field_validator

from library.options.declare import OptionGroup, flag, option

WHAT_MAKES_ROOM = "--dry_run lists the options that make room, and --memory_budget picks them."
"""For warnings of full memory."""


class ForecastOptions(OptionGroup):
    """What a run will be and how much memory it will need."""

    topic: ClassVar[str] = "Knowing before training"

    dry_run: bool = flag(
        "Check everything, say how long the run will be, what it will train and how much memory it will need, and stop; no weights "
        "are read. Exit status: 0 where it fits, 3 where it does not, 4 where that cannot be told."
    )
    dry_run_vram: float | None = option(
        None, "The same for a GPU with this many GiB of memory, in place of the one of this machine.", gt=0
    )

    memory_budget: str | None = option(
        None,
        "Keep the run within this much memory of a GPU, such as 8GB: of checkpointing, optimizer states in 8 bits or in main "
        "memory, --fused_backward_pass, block swapping and weights in fewer bits, what costs least time is picked, told as "
        "plain options, and used.",
    )

    @field_validator("memory_budget")
    @classmethod
    def _is_a_size(cls, text: str | None) -> str | None:
        if text is not None:
            parse_memory(text)
        return text

    @property
    def budget(self) -> int | None:
        """Bytes of `--memory_budget`, or None."""
        return None if self.memory_budget is None else parse_memory(self.memory_budget)

    @property
    def only_forecasts(self) -> bool:
        """Whether nothing is to be trained."""
        return self.dry_run or self.dry_run_vram is not None


def parse_memory(text: str) -> int:
    """Return the bytes of a size such as `8GB`, `7.5 GiB` or `8`; a GB has 2³⁰ bytes, as on the boxes of GPUs.

    Raises:
        ValueError: it is none, or no memory at all.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gi?b?)?\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ValueError("give a number of gigabytes, such as 8GB")
    return int(float(found[1]) * 2**30)
