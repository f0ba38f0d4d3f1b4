"""Options of image generation."""

from typing import ClassVar

from library.options.declare import OptionGroup, flag, option
from library.options.groups.attention import AttentionChoice
from library.options.groups.sample import SamplerName


class GenModelOptions(AttentionChoice, OptionGroup):
    """Which model draws, and in which number type."""

    topic: ClassVar[str] = "Model and precision"

    ckpt: str | None = option(None, "SDXL model: a single-file checkpoint, a diffusers folder, or a pattern that matches one path.")
    vae: str | None = option(None, "VAE that replaces the model's own: a file (VAE or whole model) or a diffusers folder.")
    no_half_vae: bool = flag("Keep the VAE in float32 whatever the number type.")
    fp16: bool = flag("Draw in float16; wins over --bf16.")
    bf16: bool = flag("Draw in bfloat16.")
    tokenizer_cache_dir: str | None = option(None, "Folder with copies of the tokenizers.")
    clip_skip: int | None = option(None, "Without influence on SDXL.", ge=1)
    xformers: bool = flag("Use the attention of xformers.")
    sdpa: bool = flag("Use the attention of PyTorch, which is the default.")
    diffusers_xformers: bool = flag("The same as --xformers.")
    opt_channels_last: bool = flag("Lay out memory channels last.")
    vae_batch_size: float | None = option(
        None, "Images per call of the VAE; below 1 a share of --batch_size, and --batch_size when left out.", gt=0
    )
    vae_slices: int | None = option(None, "Slices in which an image passes through the VAE.", ge=1)


class PromptOptions(OptionGroup):
    """What to draw, and how it is written down."""

    topic: ClassVar[str] = "Prompts and output"

    prompt: str | None = option(None, "The prompt, with in-prompt options such as --n, --w, --h, --d, --s and --l.")
    from_file: str | None = option(None, "UTF-8 file with one prompt per line; wins over --prompt.")
    interactive: bool = flag("Ask for prompts.")
    no_preview: bool = flag("Show no window with the image when asking for prompts.")
    images_per_prompt: int = option(1, "Images of each prompt.", ge=1)
    n_iter: int = option(1, "Rounds over all prompts.", ge=1)
    batch_size: int = option(1, "Images drawn together.", ge=1)
    outdir: str = option("outputs", "Folder for the images; made when needed.")
    sequential_file_name: bool = flag("Name the images im_000001.png and so on.")
    use_original_file_name: bool = flag("Name each image after its input image.")
    max_embeddings_multiples: int | None = option(None, "Longest prompt in chunks of 75 tokens.", ge=1)


class PictureOptions(OptionGroup):
    """Size, steps, guidance and seed; in-prompt options override them for one prompt."""

    topic: ClassVar[str] = "Size, steps, guidance and seed"

    W: int | None = option(None, "Width in pixels; 1024 when left out.", ge=8)
    H: int | None = option(None, "Height in pixels; 1024 when left out.", ge=8)
    steps: int = option(50, "Sampling steps.", ge=1, le=1000)
    sampler: SamplerName = option("ddim", "Sampler.")
    scale: float = option(7.5, "Guidance scale; at 1 or below there is no guidance and no negative prompt.")
    negative_scale: float | None = option(None, "Guidance scale of the negative prompt apart.")
    seed: int | None = option(None, "Seed of the first image, or of all that are drawn from it.", ge=0)
    iter_same_seed: bool = flag("Use the same seeds in every round of --n_iter.")


class SizeConditioningOptions(OptionGroup):
    """The sizes SDXL is told."""

    topic: ClassVar[str] = "Size conditioning"

    original_width: int | None = option(None, "Original width; the width of the image when left out.", ge=0)
    original_height: int | None = option(None, "Original height; the height of the image when left out.", ge=0)
    original_width_negative: int | None = option(
        None, "Original width for the negative prompt; --original_width when left out.", ge=0
    )
    original_height_negative: int | None = option(
        None, "Original height for the negative prompt; --original_height when left out.", ge=0
    )
    crop_top: int | None = option(None, "Rows cropped at the top; 0 when left out.", ge=0)
    crop_left: int | None = option(None, "Columns cropped at the left; 0 when left out.", ge=0)


class InputImageOptions(OptionGroup):
    """Drawing from images."""

    topic: ClassVar[str] = "Input images"

    image_path: str | None = option(None, "Input image, or folder of them.")
    mask_path: str | None = option(None, "Mask image, or folder of them: white is painted anew, black kept.")
    strength: float | None = option(None, "How much of the input image changes; 0.8 when left out.", ge=0, le=1)
    clip_vision_strength: float | None = option(None, "Strength of the input image as a prompt.")


class RefinementOptions(OptionGroup):
    """Large images: highres fix, Deep Shrink, Gradual Latent."""

    topic: ClassVar[str] = "Large images"

    highres_fix_scale: float | None = option(
        None, "Size of the first stage relative to the image; switches the highres fix on.", gt=0
    )
    highres_fix_steps: int = option(28, "Steps of the first stage.", ge=1)
    highres_fix_strength: float | None = option(None, "Strength of the first stage with an input image.", ge=0, le=1)
    highres_fix_save_1st: bool = flag("Save the image of the first stage too.")
    highres_fix_latents_upscaling: bool = flag("Enlarge the latents instead of the image.")
    highres_fix_upscaler: str | None = option(None, "Module that enlarges the image.")
    highres_fix_upscaler_args: str | None = option(None, "Arguments of that module: key=value;key=value.")
    highres_fix_disable_control_net: bool = flag("No ControlNet-LLLite in the second stage.")
    ds_depth_1: int | None = option(None, "Depth of the first shrinking; switches Deep Shrink on.", ge=0, le=8)
    ds_timesteps_1: int = option(650, "Timestep down to which the first shrinking lasts.", ge=0, le=1000)
    ds_depth_2: int | None = option(None, "Depth of the second shrinking.", ge=0, le=8)
    ds_timesteps_2: int = option(650, "Timestep down to which the second shrinking lasts.", ge=0, le=1000)
    ds_ratio: float = option(0.5, "Factor of Deep Shrink.", gt=0)
    gradual_latent_timesteps: int | None = option(
        None, "Timestep from which latents grow; switches Gradual Latent on.", ge=0, le=1000
    )
    gradual_latent_ratio: float = option(0.5, "Size of the latents at first.", gt=0)
    gradual_latent_ratio_step: float = option(0.125, "Growth at each enlargement.", gt=0)
    gradual_latent_every_n_steps: int = option(3, "Steps between enlargements.", ge=1)
    gradual_latent_s_noise: float = option(1.0, "Scale of the noise.", ge=0)
    gradual_latent_unsharp_params: str | None = option(None, "Sharpening: size,sigma,strength and optionally 1 or 0.")


class GenNetworkOptions(OptionGroup):
    """Networks and other additions to the model."""

    topic: ClassVar[str] = "Networks"

    network_module: tuple[str, ...] | None = option(None, "Module of each network, such as networks.lora.")
    network_weights: tuple[str, ...] | None = option(None, "File of each network.")
    network_mul: tuple[float, ...] | None = option(None, "Strength of each network; 1 when left out.")
    network_args: tuple[str, ...] | None = option(None, "Arguments of each network: key=value;key=value.")
    network_show_meta: bool = flag("Show the metadata of the network files.")
    network_merge: bool = flag("Merge all networks into the model: faster, but --am has no effect.")
    network_merge_n_models: int | None = option(None, "Merge only the first N networks.", ge=0)
    network_pre_calc: bool = flag("Merge the networks anew before every batch.")
    network_regional_mask_max_color_codes: int | None = option(None, "Number of colours in the mask of regions.", ge=1)
    textual_inversion_embeddings: tuple[str, ...] | None = option(None, "Embedding files; their names become words.")
    control_net_lllite_models: tuple[str, ...] | None = option(None, "ControlNet-LLLite files.")
    control_net_multipliers: tuple[float, ...] | None = option(None, "Strength of each ControlNet-LLLite; 1 when left out.")
    control_net_ratios: tuple[float, ...] | None = option(None, "Share of the steps in which each one acts; 1 when left out.")
    guide_image_path: tuple[str, ...] | None = option(None, "Control images, or folders of them.")
