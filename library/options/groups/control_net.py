"""Options about a network that follows control images."""

from typing import Annotated, ClassVar

from library.options.declare import OptionGroup, PathText, SameAsUnset, option


class ControlNetLLLiteOptions(OptionGroup):
    """The widths of the network's modules, and what they begin as."""

    topic: ClassVar[str] = "ControlNet-LLLite"

    cond_emb_dim: int | None = option(None, "Width of what each module sees of the control image; even, 32 is usual.", ge=2)
    network_dim: Annotated[int | None, SameAsUnset(0)] = option(None, "Inner width of each module; 64 is usual.", ge=1)
    network_dropout: float | None = option(None, "Probability of dropping each value inside a module in training.", ge=0, lt=1)
    network_weights: PathText = option(None, "Network file to start from.")
