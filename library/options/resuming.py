"""Which options decide the numbers of a run, so that a state resumed with others of them would continue another run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.options.record import options_of
from library.options.scripts import TrainingOptions

DECIDES = "decides"
"""The run would be another one."""
ROUNDS = "rounds"
"""The same run, but for the last digits of its numbers."""
FREE = "free"
"""No influence on the trained numbers, or compared by what it names or leads to: models, images, the length of the run."""

_GROUPS = {
    **dict.fromkeys(("precision", "compile", "distributed"), ROUNDS),
    **dict.fromkeys(("dataset", "preflight", "forecast", "caption", "image", "cache", "length"), FREE),
    **dict.fromkeys(("output", "state", "validation", "sample", "logging", "modelspec", "hub", "console", "config"), FREE),
}
"""By attribute of the options; the options of all other groups decide."""

_NAMES = {
    **dict.fromkeys(("mixed_precision", "full_fp16", "full_bf16", "weighted_captions"), DECIDES),
    **dict.fromkeys(("fp8_base", "fp8_base_unet", "base_quant"), DECIDES),
    **dict.fromkeys(("cache_latents", "cache_latents_posterior", "cache_text_encoder_outputs", "text_cache_variants"), DECIDES),
    **dict.fromkeys(("gradient_accumulation_steps", "dataset_class"), DECIDES),
    **dict.fromkeys(
        (
            "vae_batch_size",
            "vae_tiling",
            "no_half_vae",
            "fused_backward_pass",
            "fused_optimizer_groups",
            "optimizer_states",
            "ema_device",
        ),
        ROUNDS,
    ),
    **dict.fromkeys(("pretrained_model_name_or_path", "vae", "base_weights", "network_weights", "dim_from_weights"), FREE),
    "controlnet_model_name_or_path": FREE,
    **dict.fromkeys(("tokenizer_cache_dir", "disable_mmap_load_safetensors", "lowram", "clip_skip", "v2"), FREE),
    **dict.fromkeys(("training_comment", "no_metadata", "ddp_timeout"), FREE),
}
"""Options that differ from their group."""


def influence(name: str, attribute: str) -> str:
    """Return `DECIDES`, `ROUNDS` or `FREE` for an option.

    Args:
        name: of the option.
        attribute: under which the options have its group.
    """
    return _NAMES.get(name, _GROUPS.get(attribute, DECIDES))


def compared_options(options: TrainingOptions) -> dict[str, dict[str, Any]]:
    """Return the values that JSON can hold of all options that decide or round, under these two names."""
    found: dict[str, dict[str, Any]] = {DECIDES: {}, ROUNDS: {}}
    for name, option in options_of(type(options)).items():
        kind = influence(name, option.attribute)
        if kind != FREE:
            found[kind][name] = _plain(getattr(getattr(options, option.attribute), name))
    return found


def defaults(options: TrainingOptions) -> Mapping[str, Any]:
    """Return the defaults of all options, which is what a state means that was saved before there was an option."""
    return {name: _plain(option.default) for name, option in options_of(type(options)).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
