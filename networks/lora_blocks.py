"""The 23 blocks of the SDXL U-Net, by which ranks and learning rates can differ. Needs no torch.

0 time and label embedding, 1–9 `input_blocks` 0–8, 10–12 `middle_block` 0–2, 13–21 `output_blocks` 0–8, 22 `out`.
"""

import logging
import math
import re
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

NUM_BLOCKS = 23
SIDE_BLOCKS = 9
MIDDLE_BLOCKS = 3

_BLOCK_STARTS = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}
_BLOCK_NAME = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks)_(\d+)_?")

_PRESETS: dict[str, Callable[[int], float]] = {
    "sine": lambda i: math.sin(math.pi / 2 * i / (SIDE_BLOCKS - 1)),
    "cosine": lambda i: math.sin(math.pi / 2 * (SIDE_BLOCKS - 1 - i) / (SIDE_BLOCKS - 1)),
    "linear": lambda i: i / (SIDE_BLOCKS - 1),
    "reverse_linear": lambda i: (SIDE_BLOCKS - 1 - i) / (SIDE_BLOCKS - 1),
    "zeros": lambda i: 0.0,
}


def block_index(adapter_name: str) -> int | None:
    """Return the block of an adapter by its name in files (`lora_unet_…`); None for text encoders and other names."""
    if found := _BLOCK_NAME.match(adapter_name):
        return _BLOCK_STARTS[found[1]] + int(found[2])
    if adapter_name.startswith(("lora_unet_time_embed_", "lora_unet_label_emb_")):
        return 0
    return NUM_BLOCKS - 1 if adapter_name.startswith("lora_unet_out_") else None


def block_lr_weights(
    down: Sequence[float] | None = None,
    mid: Sequence[float] | None = None,
    up: Sequence[float] | None = None,
    zero_threshold: float = 0.0,
) -> tuple[float, ...]:
    """Return the learning-rate factor of each of the 23 blocks.

    Args:
        down: 9 factors for `input_blocks`; None stands for 1 everywhere.
        mid: 3 factors for `middle_block`.
        up: 9 factors for `output_blocks`.
        zero_threshold: factors that are not above it become 0.
    """
    weights = (1.0, *(down or [1.0] * SIDE_BLOCKS), *(mid or [1.0] * MIDDLE_BLOCKS), *(up or [1.0] * SIDE_BLOCKS), 1.0)
    return tuple(weight if weight > zero_threshold else 0.0 for weight in weights)


def parse_side_weights(text: str) -> tuple[float, ...]:
    """Read the factors of `input_blocks` or `output_blocks`.

    Args:
        text: 9 numbers separated by commas, one number for all, or a preset with an optional `+base` (`sine+.25`): sine, cosine,
            linear, reverse_linear, zeros. Of fewer numbers the rest is 1, with a warning.

    Raises:
        ValueError: neither numbers nor a preset; the message says what is allowed.
    """
    name, _, base = text.partition("+")
    if name.strip() not in _PRESETS:
        allowed = f"numbers separated by commas or one of {', '.join(_PRESETS)}, with +number after it if wanted"
        return _numbers(text, SIDE_BLOCKS, allowed)
    try:
        offset = float(base or 0)
    except ValueError:
        raise ValueError(f"a number is expected after {name.strip()}+") from None
    return tuple(_PRESETS[name.strip()](i) + offset for i in range(SIDE_BLOCKS))


def parse_middle_weights(text: str) -> tuple[float, ...]:
    """Read the factors of `middle_block`: 3 numbers separated by commas, or one for all.

    Raises:
        ValueError: not numbers.
    """
    return _numbers(text, MIDDLE_BLOCKS, "numbers separated by commas")


def _numbers(text: str, length: int, allowed: str) -> tuple[float, ...]:
    """Read `length` numbers; an empty item counts as 0."""
    try:
        numbers = [float(item.strip() or 0) for item in text.split(",")]
    except ValueError:
        raise ValueError(f"{allowed} are expected") from None
    if len(numbers) == 1:
        return tuple(numbers * length)
    if len(numbers) != length:
        change = "the rest is 1" if len(numbers) < length else "the rest is left out"
        logger.warning("Learning-rate weights %s: %d numbers are given for %d blocks, %s.", text, len(numbers), length, change)
    return tuple((numbers + [1.0] * length)[:length])
