"""Options about the noise and the timesteps that are trained."""

from typing import Annotated, ClassVar, Literal

from library.options.declare import OptionGroup, SameAsUnset, flag, option


class DdpmNoiseOptions(OptionGroup):
    """Noise and the range of timesteps, as sd-scripts has them."""

    topic: ClassVar[str] = "Noise and timesteps"

    noise_offset: Annotated[float | None, SameAsUnset(0)] = option(None, "Shift the noise of each channel by this much at random.")
    noise_offset_random_strength: bool = flag("Draw the noise offset between 0 and --noise_offset for each image.")
    adaptive_noise_scale: Annotated[float | None, SameAsUnset(0)] = option(
        None, "Add this much times the mean of the latents to the noise offset; needs --noise_offset."
    )
    multires_noise_iterations: Annotated[int | None, SameAsUnset(0)] = option(
        None, "Levels of coarser noise that are added (pyramid noise).", ge=1
    )
    multires_noise_discount: float = option(0.3, "Factor of each coarser level of pyramid noise.", ge=0)
    ip_noise_gamma: Annotated[float | None, SameAsUnset(0)] = option(
        None, "Perturb the input with this much more noise than the target knows."
    )
    ip_noise_gamma_random_strength: bool = flag("Draw the perturbation between 0 and --ip_noise_gamma for each image.")
    zero_terminal_snr: bool = flag("Make the last timestep pure noise; for models that predict v.")
    min_timestep: int | None = option(None, "Lowest timestep that is trained; 0 when left out.", ge=0, le=999)
    max_timestep: int | None = option(None, "Timesteps below this one are trained; 1000 when left out.", ge=1, le=1000)


class NoiseOptions(DdpmNoiseOptions):
    """Noise and timesteps."""

    timestep_distribution: Literal["uniform", "logit_normal"] = option(
        "uniform", "How timesteps are drawn between --min_timestep and --max_timestep: all alike, or most of them in the middle."
    )
    logit_mean: float = option(
        0.0, "Mean of the logit-normal distribution: above 0 more noise is trained, below 0 less; 0 is symmetric."
    )
    logit_std: float = option(1.0, "Deviation of the logit-normal distribution: the smaller, the narrower.", gt=0)
