"""Options and dataset keys whose feature does not exist yet: giving one is refused by name.

So nobody trains without what was asked for. A feature that is built is deleted here; nothing is added.
"""

from collections.abc import Container, Iterable, Mapping
from typing import Any

_FLUX = "only SDXL models are supported"
_INPUT_IMAGE = "images are drawn from prompts only"
_HIGHRES = "images are drawn in one stage"
_DEEP_SHRINK = "the U-Net runs at full size in every step"
_GRADUAL = "latents have their final size from the first step"


def _refuse(instead: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, instead)


NOT_BUILT: Mapping[str, str] = {
    **_refuse(_FLUX, "flux"),
    **_refuse("the VAE decodes whole images", "vae_slices"),
    **_refuse(_INPUT_IMAGE, "image_path", "mask_path", "strength", "clip_vision_strength", "use_original_file_name"),
    **_refuse("the negative prompt shares the scale of the prompt", "negative_scale"),
    **_refuse(_HIGHRES, "highres_fix_scale", "highres_fix_steps", "highres_fix_strength", "highres_fix_save_1st"),
    **_refuse(_HIGHRES, "highres_fix_latents_upscaling", "highres_fix_upscaler", "highres_fix_upscaler_args"),
    **_refuse(_HIGHRES, "highres_fix_disable_control_net"),
    **_refuse(_DEEP_SHRINK, "ds_depth_1", "ds_timesteps_1", "ds_depth_2", "ds_timesteps_2", "ds_ratio"),
    **_refuse(_GRADUAL, "gradual_latent_timesteps", "gradual_latent_ratio", "gradual_latent_ratio_step"),
    **_refuse(_GRADUAL, "gradual_latent_every_n_steps", "gradual_latent_s_noise", "gradual_latent_unsharp_params"),
    **_refuse("every network acts on the whole image", "network_regional_mask_max_color_codes"),
}
"""What happens instead, as a clause, for every refused option. A feature that is built is deleted here; nothing is added."""

NOT_BUILT_DATASET_KEYS: Mapping[str, tuple[str, tuple[Any, ...]]] = {}
"""Every refused key of dataset files: the reason, and the values that switch it off and are therefore accepted."""


def not_built_problems(given: Iterable[tuple[str, str]], effective: Container[str]) -> list[str]:
    """Refuse options that were given and are not built.

    Args:
        given: name and place of each option whose value differs from the default.
        effective: the options that would have an effect in the script; others may be given, as they would do nothing anyway.
    """
    return [
        f"{where} is not built yet in this version: {NOT_BUILT[name]}. Leave it out."
        for name, where in given
        if name in NOT_BUILT and name in effective
    ]
