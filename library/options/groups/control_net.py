"""Options about networks that follow control images."""

from typing import Annotated, ClassVar

from library.options.declare import OptionGroup, PathText, SameAsUnset, option


class ControlNetLLLiteOptions(OptionGroup):
    """The widths of the network's modules, and what they begin as."""

    topic: ClassVar[str] = "ControlNet-LLLite"

    cond_emb_dim: int | None = option(None, "Width of what each module sees of the control image; even, 32 is usual.", ge=2)
    network_dim: Annotated[int | None, SameAsUnset(0)] = option(None, "Inner width of each module; 64 is usual.", ge=1)
    network_dropout: float | None = option(None, "Probability of dropping each value inside a module in training.", ge=0, lt=1)
    network_weights: PathText = option(None, "Network file to start from.")


class ControlNetOptions(OptionGroup):
    """What the network begins as, and how fast its new parts learn."""

    topic: ClassVar[str] = "ControlNet"

    control_net_lr: float = option(
        1e-4, "Learning rate of what the U-Net does not have; --learning_rate is that of the copied blocks. 0 freezes."
    )
    controlnet_model_name_or_path: PathText = option(None, "ControlNet file in diffusers' layout to start from.")
