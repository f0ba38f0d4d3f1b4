"""When sample images are drawn and how their files are named; free of torch, so that it can be checked first."""

from dataclasses import dataclass
from datetime import datetime

from library.options.groups.sample import SampleOptions


@dataclass(frozen=True)
class PreviewPlan:
    """When sample images are drawn; epochs win over steps where both are given."""

    at_first: bool
    every_n_epochs: int | None
    every_n_steps: int | None

    @classmethod
    def of(cls, options: SampleOptions) -> "PreviewPlan":
        """Read the plan from the options; intervals of zero and below mean never."""
        epochs = options.sample_every_n_epochs if (options.sample_every_n_epochs or 0) > 0 else None
        steps = options.sample_every_n_steps if (options.sample_every_n_steps or 0) > 0 and epochs is None else None
        return cls(options.sample_at_first, epochs, steps)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is ever drawn."""
        return not (self.at_first or self.every_n_epochs or self.every_n_steps)

    def is_due_after_update(self, update: int) -> bool:
        """Tell whether pictures are drawn after `update` updates."""
        return self.every_n_steps is not None and update % self.every_n_steps == 0

    def is_due_after_epoch(self, epoch: int) -> bool:
        """Tell whether pictures are drawn after an epoch, counted from 1."""
        return self.every_n_epochs is not None and epoch % self.every_n_epochs == 0


def sample_name(output_name: str | None, when: str, index: int, now: datetime, seed: int | None) -> str:
    """Return the file name of a sample image: `my_e000003_00_20260131120000_42.png`.

    Args:
        output_name: `--output_name`, or None.
        when: `e` and the epoch, or the number of updates; six digits.
        index: position in the prompt file, from 0.
        now: local time.
        seed: the prompt's seed; left out where it has none.
    """
    prefix = f"{output_name}_" if output_name else ""
    suffix = "" if seed is None else f"_{seed}"
    return f"{prefix}{when}_{index:02d}_{now:%Y%m%d%H%M%S}{suffix}.png"
