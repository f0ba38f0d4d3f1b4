"""Options about knowing what a run will need before it begins."""

from typing import ClassVar

from library.options.declare import OptionGroup, flag, option


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

    @property
    def only_forecasts(self) -> bool:
        """Whether nothing is to be trained."""
        return self.dry_run or self.dry_run_vram is not None
