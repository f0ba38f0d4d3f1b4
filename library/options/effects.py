"""Which options have an effect in which script.

The caching tools accept the options of training, so that a training command line can be reused; most do nothing there.
"""

from collections.abc import Sequence

from library.options.record import options_of
from library.options.scripts import CacheLatentsOptions, CacheTextEncoderOutputsOptions, ScriptOptions

_IN_BOTH_TOOLS = frozenset(
    {
        "cache_info",
        "cache_latents",
        "cache_latents_to_disk",
        "cache_text_encoder_outputs",
        "cache_text_encoder_outputs_to_disk",
        "config_file",
        "console_log_file",
        "console_log_level",
        "console_log_simple",
        "dataset_class",
        "dataset_config",
        "ddp_timeout",
        "disable_mmap_load_safetensors",
        "flux",
        "in_json",
        "masked_loss",
        "mixed_precision",
        "output_config",
        "pretrained_model_name_or_path",
        "reg_data_dir",
        "resolution",
        "sdxl",
        "skip_cache_check",
        "strict_config",
        "train_data_dir",
        "v2",
        "validation_seed",
        "validation_split",
    }
)

_EFFECTIVE: dict[type[ScriptOptions], frozenset[str]] = {
    CacheLatentsOptions: _IN_BOTH_TOOLS
    | frozenset(
        {
            "alpha_mask",
            "bucket_no_upscale",
            "bucket_reso_steps",
            "cache_latents_posterior",
            "color_aug",
            "enable_bucket",
            "face_crop_aug_range",
            "flip_aug",
            "highvram",
            "max_bucket_reso",
            "min_bucket_reso",
            "no_half_vae",
            "random_crop",
            "resize_interpolation",
            "seed",
            "true_crop_conditioning",
            "vae",
            "vae_batch_size",
            "vae_tiling",
        }
    ),
    CacheTextEncoderOutputsOptions: _IN_BOTH_TOOLS
    | frozenset(
        {
            "caption_dropout_every_n_epochs",
            "caption_dropout_rate",
            "caption_extension",
            "caption_extention",
            "caption_prefix",
            "caption_separator",
            "caption_suffix",
            "caption_tag_dropout_rate",
            "enable_wildcard",
            "keep_tokens",
            "keep_tokens_separator",
            "max_token_length",
            "secondary_separator",
            "shuffle_caption",
            "text_cache_variants",
            "token_warmup_min",
            "token_warmup_step",
            "tokenizer_cache_dir",
            "train_batch_size",
            "weighted_captions",
        }
    ),
}


def without_effect(flags: Sequence[str]) -> str:
    """Say of options that they do nothing: `--a has no effect`, `--a, --b and --c have no effect`.

    Args:
        flags: at least one, with their hyphens.
    """
    if len(flags) == 1:
        return f"{flags[0]} has no effect"
    return f"{', '.join(flags[:-1])} and {flags[-1]} have no effect"


def effective_options(script: type[ScriptOptions]) -> frozenset[str]:
    """Return the names of the options that change what `script` does."""
    return _EFFECTIVE.get(script, frozenset(options_of(script)))
