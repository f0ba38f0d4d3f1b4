"""Options about the loss on held-out images."""

from typing import Annotated, ClassVar

from library.options.declare import OptionGroup, SameAsUnset, option


class ValidationOptions(OptionGroup):
    """Validation loss."""

    topic: ClassVar[str] = "Validation loss"

    validation_split: float = option(0.0, "Fraction of each folder's images that is held out.", ge=0, lt=1)
    validation_seed: int | None = option(
        None, "Seed of the choice of held-out images and of their noise; --seed when left out.", ge=0
    )
    validate_every_n_steps: Annotated[int | None, SameAsUnset(0)] = option(None, "Validate every N steps.", ge=1)
    validate_every_n_epochs: Annotated[int | None, SameAsUnset(0)] = option(
        None, "Validate every N epochs; every epoch when left out.", ge=1
    )
    max_validation_steps: int | None = option(None, "Most batches per validation; all when left out.", ge=1)
