"""The `--network_args` of networks.lora: names, types, ranges, and the sentences for what is wrong. Needs no torch."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from library.options.errors import UsageError
from networks.lora_blocks import NUM_BLOCKS, block_lr_weights, parse_middle_weights, parse_side_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoRAArgs:
    """Everything `--network_args` can say to networks.lora; None stands for not given."""

    dropout: float | None = None
    """Neuron dropout, the same as `--network_dropout`."""
    rank_dropout: float | None = None
    module_dropout: float | None = None
    conv_dim: int | None = None
    """Rank of 3×3 convolutions; giving it also adapts the linear and 1×1 layers of the residual blocks."""
    conv_alpha: float | None = None
    block_dims: tuple[int, ...] | None = None
    """Ranks of linear and 1×1 layers by U-Net block, 23 values; 0 for none."""
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    down_lr_weight: tuple[float, ...] | None = None
    """Factors of the U-Net's learning rate by block, given as numbers or a preset (see `networks.lora_blocks`)."""
    mid_lr_weight: tuple[float, ...] | None = None
    up_lr_weight: tuple[float, ...] | None = None
    block_lr_zero_threshold: float | None = None
    loraplus_lr_ratio: float | None = None
    """Learning rate of U over that of D (LoRA+, Hayou et al. 2024)."""
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None

    @property
    def has_convolutions(self) -> bool:
        """Whether residual blocks and samplers are adapted too."""
        return bool(self.conv_dim) or self.conv_block_dims is not None

    def lr_weights(self) -> tuple[float, ...] | None:
        """Return the factor of each of the 23 blocks, or None when none was asked for."""
        sides = (self.down_lr_weight, self.mid_lr_weight, self.up_lr_weight)
        return None if sides == (None, None, None) else block_lr_weights(*sides, self.block_lr_zero_threshold or 0.0)


def parse_lora_args(given: Mapping[str, Any]) -> LoRAArgs:
    """Convert and check the pairs of `--network_args`.

    Args:
        given: values as text, or already of their type; None means not given.

    Raises:
        UsageError: unknown keys (with the nearest known one) and wrong values, all told together.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, text in given.items():
        if key not in _PARSERS:
            problems.append(_unknown(key))
        elif text is not None:
            try:
                values[key] = _PARSERS[key](str(text).strip())
            except ValueError as error:
                problems.append(f"--network_args {key}={text}: {error}.")
    if problems:
        raise UsageError(problems)
    for key, needed in _NEEDS.items():
        if key in values and not any(name in values for name in needed):
            logger.warning("--network_args %s has no effect without %s.", key, " or ".join(needed))
    return LoRAArgs(**values)


def _unknown(key: str) -> str:
    close = get_close_matches(key, _PARSERS, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Known keys: {', '.join(_PARSERS)}."
    return f"--network_args {key} is not known to networks.lora. {hint}"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number is expected") from None


def _probability(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise ValueError("a probability from 0 to below 1 is expected")
    return value


def _not_negative(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise ValueError("a number not below 0 is expected")
    return value


def _rank(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("a whole number not below 0 is expected")
    return int(text)


def _per_block(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse_list(text: str) -> tuple[Any, ...]:
        items = text.split(",")
        if len(items) != NUM_BLOCKS:
            raise ValueError(f"{NUM_BLOCKS} values separated by commas are expected, one for each block; there are {len(items)}")
        return tuple(parse(item.strip()) for item in items)

    return parse_list


_PARSERS: dict[str, Callable[[str], Any]] = {
    "dropout": _probability,
    "rank_dropout": _probability,
    "module_dropout": _probability,
    "conv_dim": _rank,
    "conv_alpha": _not_negative,
    "block_dims": _per_block(_rank),
    "block_alphas": _per_block(_not_negative),
    "conv_block_dims": _per_block(_rank),
    "conv_block_alphas": _per_block(_not_negative),
    "down_lr_weight": parse_side_weights,
    "mid_lr_weight": parse_middle_weights,
    "up_lr_weight": parse_side_weights,
    "block_lr_zero_threshold": _number,
    "loraplus_lr_ratio": _not_negative,
    "loraplus_unet_lr_ratio": _not_negative,
    "loraplus_text_encoder_lr_ratio": _not_negative,
}

_LR_WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")

_NEEDS: dict[str, tuple[str, ...]] = {
    "conv_alpha": ("conv_dim", "conv_block_dims"),
    "block_alphas": ("block_dims", *_LR_WEIGHTS),
    "conv_block_dims": ("block_dims", *_LR_WEIGHTS),
    "conv_block_alphas": ("conv_block_dims", "conv_dim"),
    "block_lr_zero_threshold": _LR_WEIGHTS,
}
"""Arguments that do nothing on their own, and those of which at least one must be there too."""
