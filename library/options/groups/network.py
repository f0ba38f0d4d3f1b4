"""Options about the network that is trained."""

from typing import Annotated, ClassVar

from library.options.declare import LocalPath, OptionGroup, PathText, SameAsUnset, flag, option


class NetworkOptions(OptionGroup):
    """The trained network and the rates of its parts."""

    topic: ClassVar[str] = "Network"

    network_module: str | None = option(None, "Module that makes the network: networks.lora, lycoris.kohya, ...")
    network_dim: Annotated[int | None, SameAsUnset(0)] = option(None, "Rank of the network; 4 when left out.", ge=1)
    network_alpha: float = option(1, "The network's effect is scaled by alpha / dim.", ge=0)
    network_dropout: float | None = option(
        None, "Probability of dropping each value of the down-projection in training.", ge=0, lt=1
    )
    network_args: tuple[str, ...] | None = option(None, "Further arguments of the network module, each key=value.")
    network_weights: PathText = option(None, "Network file to start from.")
    dim_from_weights: bool = flag("Take rank and alpha of every module from --network_weights.")
    network_train_unet_only: bool = flag("Train the U-Net only.")
    network_train_text_encoder_only: bool = flag("Train the text encoders only.")
    unet_lr: float | None = option(None, "Learning rate of the U-Net; --learning_rate when left out. 0 freezes it.")
    text_encoder_lr: tuple[float, ...] | None = option(
        None, "Learning rate of both text encoders, or one for each (CLIP-L, then OpenCLIP bigG). 0 freezes."
    )
    text_encoder_lr1: float | None = option(None, "Learning rate of text encoder 1, CLIP ViT-L; wins over --text_encoder_lr.")
    text_encoder_lr2: float | None = option(
        None, "Learning rate of text encoder 2, OpenCLIP ViT-bigG; wins over --text_encoder_lr."
    )
    base_weights: Annotated[tuple[str, ...] | None, LocalPath()] = option(
        None, "Network files that are merged into the base model before training, in their order."
    )
    base_weights_multiplier: tuple[float, ...] | None = option(
        None, "Strengths of --base_weights, in their order; 1 when left out."
    )
    scale_weight_norms: Annotated[float | None, SameAsUnset(0)] = option(
        None, "After each step scale every module whose norm exceeds this down to it; 1 is a good start.", gt=0
    )
    training_comment: str | None = option(None, "Comment stored in the metadata, also with --no_metadata.")
    no_metadata: bool = flag("Store only the metadata that is needed to use the file, and what you say of it yourself.")

    def text_encoder_rates(self) -> tuple[float | None, float | None]:
        """Return the rates asked for encoder 1 (CLIP ViT-L) and encoder 2 (OpenCLIP bigG); None means `--learning_rate`."""
        both = self.text_encoder_lr or ()
        first, second = (both[0], both[-1]) if both else (None, None)
        return (
            first if self.text_encoder_lr1 is None else self.text_encoder_lr1,
            second if self.text_encoder_lr2 is None else self.text_encoder_lr2,
        )
