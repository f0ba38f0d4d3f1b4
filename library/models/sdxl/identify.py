"""Tell what a file of tensors is when it is not an SDXL checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

from library.models.sdxl.sizes import Shapes
from library.options.errors import UserError


@dataclass(frozen=True)
class Kind:
    """Something a file may be instead, how it is recognised, and what to do with it."""

    title: str
    matches: Callable[[Shapes], bool]
    advice: str = "Give an SDXL base checkpoint."


def _starts(*prefixes: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(name.startswith(prefixes) for name in shapes)


def _contains(*pieces: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(piece in name for name in shapes for piece in pieces)


def _has_nine_input_channels(shapes: Shapes) -> bool:
    stem = shapes.get("model.diffusion_model.input_blocks.0.0.weight", (0, 0))
    return stem[1] == 9


def _is_textual_inversion(shapes: Shapes) -> bool:
    return len(shapes) <= 4 and bool(shapes.keys() & {"emb_params", "clip_l", "clip_g", "string_to_param", "*"})


_ADAPTER = "Give it as --network_weights, and an SDXL base checkpoint as --pretrained_model_name_or_path."
_KINDS = (
    Kind("a LoRA or another adapter", _contains("lora_down", "lora_up", ".lora_A.", "lokr_w", "hada_w", "oft_diag"), _ADAPTER),
    Kind("a ControlNet-LLLite", _starts("lllite_"), _ADAPTER),
    Kind("a ControlNet", _contains("control_model.", "controlnet_cond_embedding", "controlnet_down_blocks")),
    Kind("a textual inversion embedding", _is_textual_inversion),
    Kind("Stable Diffusion 2", _starts("cond_stage_model.model.")),
    Kind("Stable Diffusion 1", _starts("cond_stage_model.")),
    Kind(
        "an SDXL refiner", _starts("conditioner.embedders.0.model."), "The refiner has another U-Net; give an SDXL base checkpoint."
    ),
    Kind(
        "an SDXL inpainting model",
        _has_nine_input_channels,
        "Its U-Net takes 9 channels instead of 4; give an SDXL base checkpoint.",
    ),
    Kind("an EDM-type SDXL model (Playground 2.5, CosXL)", _starts("edm_mean", "edm_vpred."), "Its noise process is another one."),
    Kind("Stable Diffusion 3", _contains("joint_blocks.", "joint_transformer_blocks")),
    Kind("FLUX.1", _contains("double_blocks.", "single_transformer_blocks")),
    Kind(
        "the U-Net file of a diffusers folder",
        _starts("down_blocks.", "add_embedding."),
        "Give the folder that model_index.json lies in.",
    ),
    Kind("a text encoder", _starts("text_model.", "encoder.layers.", "transformer.resblocks.")),
    Kind(
        "a VAE",
        _starts("encoder.", "decoder."),
        "Give it as --vae, and an SDXL base checkpoint as --pretrained_model_name_or_path.",
    ),
)
_PREFIX_TITLES = (
    ("model.diffusion_model.", "U-Net"),
    ("conditioner.embedders.0.transformer.", "first text encoder"),
    ("conditioner.embedders.1.model.", "second text encoder"),
)


def refuse_foreign(path: str, shapes: Shapes) -> None:
    """Raise if a file is not an SDXL checkpoint.

    Args:
        path: for the message.
        shapes: of all tensors under the file's names.

    Raises:
        UserError: says what the file is, as far as that can be told.
    """
    for kind in _KINDS:
        if kind.matches(shapes):
            raise UserError(f"{path} is not an SDXL checkpoint but {kind.title}. {kind.advice}")
    missing = [title for prefix, title in _PREFIX_TITLES if not any(name.startswith(prefix) for name in shapes)]
    if len(missing) == len(_PREFIX_TITLES):
        first = ", ".join(list(shapes)[:3]) or "none"
        raise UserError(f"{path} is not an SDXL checkpoint: nothing in it is known. It has {len(shapes)} tensors: {first} …")
    if missing:
        raise UserError(
            f"{path} is not a complete SDXL checkpoint: it has no {' and no '.join(missing)}. "
            "Give a checkpoint that holds the U-Net and both text encoders, or a diffusers folder."
        )
