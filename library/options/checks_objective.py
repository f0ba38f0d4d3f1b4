"""Options of the noise, the timesteps and the loss that exclude each other, and those that do nothing as they are."""

from collections.abc import Iterator

from library.options.groups.loss import LossOptions
from library.options.groups.noise import NoiseOptions


def objective_problems(noise: NoiseOptions, loss: LossOptions, v_parameterization: bool) -> Iterator[str]:
    """Yield a sentence for everything that keeps options of the objective from being used together."""
    if noise.adaptive_noise_scale is not None and noise.noise_offset is None:
        yield "--adaptive_noise_scale changes the noise offset, so it needs --noise_offset above 0."
    lowest, end = noise.min_timestep or 0, 1000 if noise.max_timestep is None else noise.max_timestep
    if lowest >= end:
        yield f"--min_timestep ({lowest}) must be below --max_timestep ({end}), or no timestep is left to train."
    if noise.timestep_distribution == "uniform" and (noise.logit_mean, noise.logit_std) != (0, 1):
        yield (
            "--logit_mean and --logit_std shape the logit-normal distribution of timesteps, but they are drawn uniformly. Add "
            "--timestep_distribution logit_normal, or leave them out."
        )
    if loss.scale_v_pred_loss_like_noise_pred and not v_parameterization:
        yield "--scale_v_pred_loss_like_noise_pred is for v-prediction and needs --v_parameterization."
    if loss.v_pred_like_loss is not None and v_parameterization:
        yield "--v_pred_like_loss is for noise prediction and excludes --v_parameterization."


def objective_notes(noise: NoiseOptions, loss: LossOptions, v_parameterization: bool) -> Iterator[str]:
    """Yield a sentence for everything about the objective that is odd but can be done."""
    if noise.zero_terminal_snr and not v_parameterization:
        yield "--zero_terminal_snr is meant for v-prediction; without --v_parameterization the last timestep teaches nothing."
    for name in ("noise_offset", "ip_noise_gamma"):
        if getattr(noise, f"{name}_random_strength") and getattr(noise, name) is None:
            yield f"--{name}_random_strength has no effect without --{name}."
    if noise.multires_noise_discount != 0.3 and noise.multires_noise_iterations is None:
        yield "--multires_noise_discount has no effect without --multires_noise_iterations."
    if loss.loss_type not in ("huber", "smooth_l1"):
        defaults = LossOptions()
        for name in ("huber_schedule", "huber_c", "huber_scale"):
            if getattr(loss, name) != getattr(defaults, name):
                yield f"--{name} has no effect with --loss_type {loss.loss_type}; it is for huber and smooth_l1."
    elif loss.huber_schedule == "snr" and loss.huber_scale != 1:
        yield "--huber_scale has no effect with --huber_schedule snr."
