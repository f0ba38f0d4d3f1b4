"""Options about which parts of a whole model are trained, and how fast."""

import math
from typing import Annotated, ClassVar

from pydantic import field_validator

from library.options.declare import CommaList, OptionGroup, flag, option

NUM_BLOCKS = 23
"""Blocks of the SDXL U-Net that `--block_lr` tells apart."""


class FinetuneOptions(OptionGroup):
    """The trained parts of the model and their rates; the U-Net has `--learning_rate`, and 0 freezes it."""

    topic: ClassVar[str] = "Fine-tuning"

    train_text_encoder: bool = flag("Train both text encoders with the U-Net.")
    learning_rate_te1: float | None = option(
        None, "Learning rate of text encoder 1, CLIP ViT-L; --learning_rate when left out. 0 freezes it."
    )
    learning_rate_te2: float | None = option(
        None, "Learning rate of text encoder 2, OpenCLIP ViT-bigG; --learning_rate when left out. 0 freezes it."
    )
    block_lr: Annotated[str | None, CommaList()] = option(
        None,
        "23 learning rates separated by commas: embeddings of time and size, 9 input blocks, 3 middle blocks, 9 output blocks, "
        "output head. 0 freezes a block.",
    )

    @field_validator("block_lr")
    @classmethod
    def _are_rates(cls, text: str | None) -> str | None:
        if text is not None:
            parse_rates(text)
        return text

    @property
    def block_rates(self) -> tuple[float, ...] | None:
        """The rates of the 23 blocks, or None where the whole U-Net has one."""
        return None if self.block_lr is None else parse_rates(self.block_lr)

    def text_encoder_rates(self, default: float) -> tuple[float, float]:
        """Return the rates of encoder 1 (CLIP ViT-L) and encoder 2 (OpenCLIP ViT-bigG); 0 for one that is not trained.

        Args:
            default: `--learning_rate`.
        """
        if not self.train_text_encoder:
            return 0.0, 0.0
        first, second = (default if rate is None else rate for rate in (self.learning_rate_te1, self.learning_rate_te2))
        return first, second


def parse_rates(text: str) -> tuple[float, ...]:
    """Read the 23 numbers of `--block_lr`.

    Raises:
        ValueError: there are more or fewer, or one of them is no finite number.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != NUM_BLOCKS:
        raise ValueError(
            f"{NUM_BLOCKS} learning rates with commas are wanted, one for each block of the U-Net; these are {len(parts)}"
        )
    return tuple(map(_rate, parts))


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not math.isfinite(rate):
        raise ValueError(f"{text!r} is not a number; a rate looks like 1e-5")
    return rate
