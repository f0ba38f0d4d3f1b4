"""Options about looking at the data instead of training."""

from pathlib import Path
from typing import ClassVar

from library.options.declare import OptionGroup, option


class PreflightOptions(OptionGroup):
    """What is done with the dataset before, or instead of, training."""

    topic: ClassVar[str] = "Looking at the dataset"

    dataset_report: Path | None = option(
        None, "Check the dataset, write dataset_report.html and dataset_report.json into this folder, and stop; no model is loaded."
    )
