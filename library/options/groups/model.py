"""Options about the base model."""

from typing import Annotated, ClassVar, Literal

from library.options.declare import OptionGroup, PathText, SameAsUnset, flag, option


class ModelOptions(OptionGroup):
    """Which model is trained and how its files are read."""

    topic: ClassVar[str] = "Base model"

    pretrained_model_name_or_path: PathText = option(
        None, "Base SDXL model: a single-file checkpoint (.safetensors, .ckpt) or a diffusers folder."
    )
    v2: bool = flag("Stable Diffusion 2.x; refused, because these scripts are for SDXL.")
    v_parameterization: bool = flag("Train on the velocity target; for models that predict v instead of noise.")
    tokenizer_cache_dir: PathText = option(None, "Folder with copies of the tokenizers.")
    vae: PathText = option(None, "VAE that replaces the model's own: a file (VAE or whole model) or a diffusers folder.")
    disable_mmap_load_safetensors: bool = flag(
        "Read checkpoint files a tensor at a time instead of mapping them into memory; faster on some network drives."
    )
    lowram: bool = flag(
        "Keep the VAE on the accelerator between sample images, for machines with little main memory; models are always loaded "
        "straight onto it."
    )
    max_token_length: Annotated[Literal[150, 225] | None, SameAsUnset(75)] = option(
        None, "Longest caption in tokens; 75 when left out. Longer captions are encoded in chunks of 75."
    )
    clip_skip: int | None = option(None, "Without influence on SDXL: only recorded in the metadata.", ge=1)
