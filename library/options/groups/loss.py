"""Options about the loss."""

from typing import Annotated, ClassVar, Literal

from library.options.declare import OptionGroup, SameAsUnset, flag, option


class ElementLossOptions(OptionGroup):
    """The loss of one element of the prediction."""

    topic: ClassVar[str] = "Loss"

    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = option("l2", "Loss between prediction and target.")
    huber_schedule: Literal["constant", "exponential", "snr"] = option(
        "snr", "How the constant of the two Huber losses follows the timestep."
    )
    huber_c: float = option(0.1, "Constant of the Huber losses.", gt=0)
    huber_scale: float = option(1.0, "Scale of the Huber constant; without effect on the snr schedule.", gt=0)
    masked_loss: bool = flag("Weight the loss of each place by the image of the same name in conditioning_data_dir.")


class LossOptions(ElementLossOptions):
    """The loss, how masks count, and its weight by timestep."""

    masked_loss_normalize: bool = flag(
        "Divide the loss by the area of the mask, so that a small mask counts as much as a large one."
    )

    min_snr_gamma: Annotated[float | None, SameAsUnset(0)] = option(
        None, "Weight each image's loss by min(SNR, gamma) / SNR; 5 is the paper's choice.", gt=0
    )
    debiased_estimation_loss: bool = flag("Weight each image's loss by 1 / sqrt(SNR).")
    scale_v_pred_loss_like_noise_pred: bool = flag("Weight the loss of v-prediction like that of noise prediction.")
    v_pred_like_loss: Annotated[float | None, SameAsUnset(0)] = option(
        None, "Add this much of a loss weighted as for v-prediction; not with --v_parameterization."
    )
