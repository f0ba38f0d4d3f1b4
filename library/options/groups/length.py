"""Options about how long to train, and from which seed."""

from typing import Annotated, ClassVar

from library.options.declare import OptionGroup, SameAsUnset, option


class LengthOptions(OptionGroup):
    """Number of steps and the seed."""

    topic: ClassVar[str] = "Training length and seed"

    max_train_steps: int = option(1600, "Number of optimizer steps.", ge=1)
    max_train_epochs: Annotated[int | None, SameAsUnset(0)] = option(
        None, "Number of passes over the dataset; replaces --max_train_steps.", ge=1
    )
    gradient_accumulation_steps: int = option(1, "Batches whose gradients are added up for one step.", ge=1)
    seed: int | None = option(None, "Seed of every random draw; drawn at random, and recorded, when left out.", ge=0)
