"""Turn captions into text outputs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from library.models.caption_encoding import encode_captions
from library.models.family import Family, TextCond
from library.models.prompt_weights import PromptStyle
from library.options.errors import UserError


@dataclass(frozen=True)
class TextEncoder:
    """The text encoders and how they are used.

    Args:
        family: knows how to call them.
        load: gives the encoders, on `device` and in `dtype`; called when there is something to encode.
        device: where they compute.
        dtype: of their weights.
        max_token_length: to which the family cuts and pads captions; part of what makes an entry what it is.
        batch_size: captions per call.
        style: how brackets weigh the tokens between them; None reads brackets as text. Part of what makes an entry what it is.
    """

    family: Family
    load: Callable[[], Sequence[nn.Module | None]]
    device: torch.device
    dtype: torch.dtype
    max_token_length: int
    batch_size: int = 1
    style: PromptStyle | None = None

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Iterator[tuple[str, TextCond]]:
        """Yield each caption with its outputs, on the CPU, without a batch axis.

        Raises:
            UserError: outputs are not finite.
        """
        for start in range(0, len(captions), self.batch_size):
            group = captions[start : start + self.batch_size]
            encoded = encode_captions(self.family, group, self.load(), self.device, self.style)
            cond = {name: value.cpu() for name, value in encoded.items()}
            for position, caption in enumerate(group):
                sample = {name: value[position].clone() for name, value in cond.items()}
                if not all(value.isfinite().all() for value in sample.values() if value.is_floating_point()):
                    raise UserError(
                        f"The text encoders give values that are not finite for the caption {caption!r}. "
                        f"They compute in {str(self.dtype).removeprefix('torch.')}; try --mixed_precision bf16 or no."
                    )
                yield caption, sample
