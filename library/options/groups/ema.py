"""Options about the moving average of the trained weights."""

from typing import Annotated, ClassVar, Literal

from library.options.declare import OptionGroup, SameAsUnset, option


class EmaOptions(OptionGroup):
    """An average of the trained weights over the last updates, saved beside each model."""

    topic: ClassVar[str] = "Moving average of the weights"

    ema_decay: Annotated[float | None, SameAsUnset(0)] = option(
        None,
        "Average the trained weights and save the average beside each model as NAME-ema: each update moves it by 1 - decay towards "
        "the weights. 0.999 looks back over about 1000 updates.",
        gt=0,
        lt=1,
    )
    ema_device: Literal["cpu", "device"] = option(
        "cpu", "Where the average is kept, in float32: in main memory, or on the device that trains."
    )
