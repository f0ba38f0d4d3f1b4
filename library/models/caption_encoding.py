"""From captions to what the denoiser is conditioned on, weights and all; the same in training and in caches."""

from collections.abc import Sequence

import torch
from torch import nn

from library.diffusion.transfer import to_device
from library.models.family import Family, TextCond
from library.models.prompt_weights import PromptStyle


def encode_captions(
    family: Family,
    captions: Sequence[str],
    encoders: Sequence[nn.Module | None],
    device: torch.device,
    style: PromptStyle | None = None,
) -> TextCond:
    """Encode B captions; gradients flow where they are enabled.

    Args:
        family: knows how.
        captions: B texts.
        encoders: on `device`.
        device: where they compute.
        style: how brackets weigh the tokens between them; None reads brackets as text.

    Returns:
        The conditioning, batch B.
    """
    if style is None:
        return family.encode_text({name: to_device(ids, device) for name, ids in family.tokenize(captions).items()}, encoders)
    each = family.encode_prompts(captions, encoders, style)
    return {name: torch.cat([cond[name] for cond in each]) for name in each[0]}
