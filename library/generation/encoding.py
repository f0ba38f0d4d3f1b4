"""Which code encodes weighted prompts for which family."""

import importlib
from collections.abc import Callable, Sequence

from torch import nn

from library.models.family import Family, TextCond
from library.models.prompt_weights import PromptStyle
from library.options.errors import UserError

_ENCODE_PROMPTS = {"sdxl": "library.models.sdxl.weighted_text"}
"""Family name to the module whose `encode_prompts` knows its text encoders."""


def encode_prompts(
    family: Family, texts: Sequence[str], encoders: Sequence[nn.Module | None], style: PromptStyle
) -> list[TextCond]:
    """Encode the texts of one picture to the same length, with their weights.

    Returns:
        One conditioning per text, each with a batch axis of 1.

    Raises:
        UserError: pictures of this family cannot be drawn.
    """
    module = _ENCODE_PROMPTS.get(family.name)
    if module is None:
        raise UserError(f"Pictures cannot be drawn with {family.name} models; the families are {', '.join(_ENCODE_PROMPTS)}.")
    encode: Callable[..., list[TextCond]] = importlib.import_module(module).encode_prompts
    return encode(family, texts, encoders, style)
