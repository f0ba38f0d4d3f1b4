"""Names that mean something to another script of the suite, or to a script for another model family.

Front ends write all their options into one file whatever the script; a key from this list is therefore no typing error.
"""

from library.options.record import options_of
from library.options.scripts import SCRIPTS, ScriptOptions

_OTHER_SCRIPTS = frozenset(
    {
        "apply_lg_attn_mask",
        "attn_mode",
        "blockwise_fused_optimizers",
        "byt5",
        "clip_g",
        "clip_g_dropout_rate",
        "clip_l_dropout_rate",
        "cross_attn_lr",
        "double_blocks_to_swap",
        "enable_scaled_pos_embed",
        "fp8_scaled",
        "fp8_vl",
        "gemma2",
        "gemma2_max_token_length",
        "init_word",
        "learning_rate_te",
        "learning_rate_te3",
        "llm_adapter_lr",
        "llm_adapter_path",
        "mem_eff_save",
        "mlp_lr",
        "mod_lr",
        "no_token_padding",
        "num_last_block_to_freeze",
        "num_vectors_per_token",
        "pos_emb_random_crop_rate",
        "qwen3",
        "qwen3_max_token_length",
        "sample_batch_size",
        "save_clip",
        "save_t5xxl",
        "self_attn_lr",
        "single_blocks_to_swap",
        "skip_latents_validity_check",
        "split_attn",
        "split_mode",
        "stop_text_encoder_training",
        "system_prompt",
        "t5_dropout_rate",
        "t5_max_token_length",
        "t5_tokenizer_path",
        "t5xxl_device",
        "text_encoder",
        "text_encoder_cpu",
        "token_string",
        "train_t5xxl",
        "training_shift",
        "unsloth_offload_checkpointing",
        "use_flash_attn",
        "use_object_template",
        "use_sage_attn",
        "use_style_template",
        "use_t5xxl_cache_only",
        "vae_chunk_size",
        "vae_disable_cache",
        "weights",
    }
)


def names_elsewhere(script: type[ScriptOptions]) -> frozenset[str]:
    """Return the option names that other training scripts and tools know and `script` does not."""
    declared = {name for other in SCRIPTS if "config" in other.groups() for name in options_of(other)}
    return (_OTHER_SCRIPTS | declared) - options_of(script).keys()
