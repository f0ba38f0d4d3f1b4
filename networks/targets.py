"""Which layers of a model get an adapter, and what they are called in files."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

UNET_CONTAINERS = frozenset({"Transformer2DModel"})
UNET_CONVOLUTION_CONTAINERS = frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D"})
TEXT_ENCODER_CONTAINERS = frozenset({"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"})


@dataclass(frozen=True)
class Target:
    """A layer that can have an adapter."""

    name: str
    """Its name in files, for example `lora_unet_input_blocks_4_1_proj_in`."""
    layer: nn.Linear | nn.Conv2d


def unet_targets(unet: nn.Module, with_convolutions: bool) -> list[Target]:
    """Return the U-Net's targets: the transformers' layers, and with convolutions those of residual blocks and samplers too."""
    containers = UNET_CONTAINERS | UNET_CONVOLUTION_CONTAINERS if with_convolutions else UNET_CONTAINERS
    return [Target(f"lora_unet_{path}", layer) for path, layer in _layers_inside(unet, containers)]


def text_encoder_targets(text_encoder: nn.Module, prefix: str) -> list[Target]:
    """Return the targets of a CLIP text encoder.

    Args:
        text_encoder: a CLIP text model of transformers.
        prefix: `lora_te1`, `lora_te2`, or `lora_te` for the only encoder of a model.
    """
    found = _layers_inside(with_text_model_level(text_encoder), TEXT_ENCODER_CONTAINERS)
    return [Target(f"{prefix}_{path}", layer) for path, layer in found]


def with_text_model_level(text_encoder: nn.Module) -> nn.Module:
    """Return a module under which the encoder's layers have the names of files, which all begin with `text_model`.

    Newer versions of transformers have no such level in CLIPTextModel. Network modules that name adapters by walking the encoder
    (LyCORIS does) must be given this one.
    """
    has_level = any(name == "text_model" for name, _ in text_encoder.named_children())
    return text_encoder if has_level else nn.ModuleDict({"text_model": text_encoder})


def encoders_for_module(name: str, text_encoders: Sequence[nn.Module | None]) -> list[nn.Module | None]:
    """Return the text encoders as a network module wants them: ours finds names itself, others walk the module tree.

    Args:
        name: of the network module, such as `networks.lora` or `lycoris.kohya`.
        text_encoders: in the family's order; None keeps the place of one that is not loaded, where the module knows such places.
    """
    if name.startswith("networks."):
        return list(text_encoders)
    return [with_text_model_level(encoder) for encoder in text_encoders if encoder is not None]


def _layers_inside(root: nn.Module, containers: Collection[str]) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yield path (dots as underscores) and layer of every linear layer and convolution inside a module of these class names."""
    for container_path, container in root.named_modules():
        if type(container).__name__ not in containers:
            continue
        for path, layer in container.named_modules(prefix=container_path):
            if isinstance(layer, nn.Linear | nn.Conv2d):
                yield path.replace(".", "_"), layer
