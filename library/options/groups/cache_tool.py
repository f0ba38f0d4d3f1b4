"""Options only the two caching tools have."""

from typing import ClassVar, Literal

from library.options.declare import OptionGroup, flag, option


class CacheToolOptions(OptionGroup):
    """Which kind of model the cache is for; most options here are those of FLUX.1 training, so that its command lines parse."""

    topic: ClassVar[str] = "Caching tools"

    sdxl: bool = flag("The model is SDXL, which is also assumed when this is left out.")
    flux: bool = flag("The model is FLUX.1.")
    skip_existing: bool = flag("Old switch without effect; --skip_cache_check trusts existing files.")
    ae: str | None = option(None, "FLUX.1 autoencoder file.")
    clip_l: str | None = option(None, "FLUX.1 CLIP-L file.")
    t5xxl: str | None = option(None, "FLUX.1 T5-XXL file.")
    t5xxl_max_token_length: int | None = option(None, "FLUX.1: longest caption in T5 tokens.", ge=1)
    apply_t5_attn_mask: bool = flag("FLUX.1: mask the padding of T5.")
    text_encoder_batch_size: int | None = option(None, "FLUX.1: captions per call of the text encoders.", ge=1)
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"] = option(
        "uniform", "Training option of flow models."
    )
    logit_mean: float = option(0.0, "Training option of flow models.")
    logit_std: float = option(1.0, "Training option of flow models.")
    mode_scale: float = option(1.29, "Training option of flow models.")
    blocks_to_swap: int | None = option(None, "Training option of flow models.", ge=0)
    controlnet_model_name_or_path: str | None = option(None, "Training option of FLUX.1.")
    guidance_scale: float = option(3.5, "Training option of FLUX.1.")
    timestep_sampling: Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift"] = option("sigma", "Training option of FLUX.1.")
    sigmoid_scale: float = option(1.0, "Training option of FLUX.1.")
    model_prediction_type: Literal["raw", "additive", "sigma_scaled"] = option("sigma_scaled", "Training option of FLUX.1.")
    discrete_flow_shift: float = option(3.0, "Training option of FLUX.1.")
    model_type: Literal["flux", "chroma"] = option("flux", "Training option of FLUX.1.")


class CacheTextToolOptions(CacheToolOptions):
    """The same for the tool that caches text-encoder outputs."""

    t5xxl_dtype: str | None = option(None, "FLUX.1: number type of T5.")
