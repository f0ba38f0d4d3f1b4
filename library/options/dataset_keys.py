"""The keys of a dataset file: name, type, where each may stand, its command-line twin and its default."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

GENERAL, DATASET, SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"

_ALL = (GENERAL, DATASET, SUBSET)
_ABOVE_SUBSET = (GENERAL, DATASET)

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


class NotThatType(ValueError):
    """A value cannot be read as what the key takes; the text says what that is."""


@dataclass(frozen=True)
class Key:
    """One key of the dataset file."""

    name: str
    read: Callable[[Any], Any]
    """Turns the value of the file into the key's type; raises NotThatType."""
    levels: tuple[str, ...]
    default: Any = None
    option: str | None = None
    """The command-line option that is the fallback, by attribute name."""


def as_bool(value: Any) -> bool:
    """Read true or false, also quoted."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise NotThatType("true or false")


def as_str(value: Any) -> str:
    """Read a text."""
    if isinstance(value, str):
        return value
    raise NotThatType("a text in quotes")


def integer(minimum: int) -> Callable[[Any], int]:
    """Make a reader of whole numbers of at least `minimum`; a quoted number and 8.0 are read as the number."""

    def read(value: Any) -> int:
        number = _number(value)
        if number is None or number != int(number) or number < minimum:
            raise NotThatType(f"a whole number of at least {minimum}")
        return int(number)

    return read


def fraction(value: Any) -> float:
    """Read a number from 0 to 1."""
    number = _number(value)
    if number is None or not 0 <= number <= 1:
        raise NotThatType("a number from 0 to 1")
    return number


def share_below_all(value: Any) -> float:
    """Read a number from 0 to below 1."""
    found = _number(value)
    if found is None or not 0 <= found < 1:
        raise NotThatType("a number from 0 to below 1: something has to be left to train on")
    return found


def number(minimum: float | None = None) -> Callable[[Any], float]:
    """Make a reader of numbers, whole ones included."""

    def read(value: Any) -> float:
        found = _number(value)
        if found is None or (minimum is not None and found < minimum):
            raise NotThatType("a number" if minimum is None else f"a number of at least {minimum:g}")
        return found

    return read


def factor_range(value: Any) -> tuple[float, float]:
    """Read two factors, the smaller one first: [2.0, 4.0] or "2.0,4.0"."""
    parts = value.split(",") if isinstance(value, str) else value
    numbers = [_number(part) for part in parts] if isinstance(parts, list | tuple) else []
    match numbers:
        case [float(low), float(high)] if 0 < low <= high:
            return low, high
    raise NotThatType("two numbers above 0 of which the second is not the smaller, such as [2.0, 4.0]")


def table(value: Any) -> Mapping[str, Any]:
    """Read a table with whatever it holds."""
    if isinstance(value, Mapping):
        return dict(value)
    raise NotThatType("a table, such as { diff_output_preservation = true }")


def interpolation(value: Any) -> str:
    """Read the name of a resampling method."""
    if value in INTERPOLATIONS:
        return str(value)
    raise NotThatType("one of " + ", ".join(INTERPOLATIONS))


def resolution(value: Any) -> tuple[int, int]:
    """Read a width and height in pixels: 1024, [832, 1216], "1024" or "832,1216"."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers = [_number(part) for part in parts]
    sides = [int(number) for number in numbers if number is not None and number == int(number) and number > 0]
    if len(sides) != len(parts) or len(sides) not in (1, 2):
        raise NotThatType('a side in pixels such as 1024, or width and height such as [832, 1216] or "832,1216"')
    return sides[0], sides[-1]


def extension(value: Any) -> str:
    """Read a file name ending; a missing dot is added."""
    text = as_str(value)
    return text if text.startswith(".") else f".{text}"


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < 2**53 else None  # rejects nan and inf too


_KEYS = (
    Key("resolution", resolution, _ABOVE_SUBSET, option="resolution"),
    Key("batch_size", integer(1), _ABOVE_SUBSET, 1, option="train_batch_size"),
    Key("enable_bucket", as_bool, _ABOVE_SUBSET, False, option="enable_bucket"),
    Key("min_bucket_reso", integer(1), _ABOVE_SUBSET, 256, option="min_bucket_reso"),
    Key("max_bucket_reso", integer(1), _ABOVE_SUBSET, 1024, option="max_bucket_reso"),
    Key("bucket_reso_steps", integer(1), _ABOVE_SUBSET, 64, option="bucket_reso_steps"),
    Key("bucket_no_upscale", as_bool, _ABOVE_SUBSET, False, option="bucket_no_upscale"),
    Key("network_multiplier", number(), _ABOVE_SUBSET, 1.0),
    Key("resize_interpolation", interpolation, _ALL, option="resize_interpolation"),
    Key("validation_split", share_below_all, _ALL, 0.0, option="validation_split"),
    Key("validation_seed", integer(0), _ALL, option="validation_seed"),
    Key("image_dir", as_str, (SUBSET,)),
    Key("metadata_file", as_str, (SUBSET,)),
    Key("conditioning_data_dir", as_str, (SUBSET,)),
    Key("is_reg", as_bool, (SUBSET,), False),
    Key("class_tokens", as_str, _ALL),
    Key("caption_extension", extension, _ALL, ".caption", option="caption_extension"),
    Key("num_repeats", integer(-(2**31)), _ALL, 1, option="dataset_repeats"),
    Key("cache_info", as_bool, _ALL, False, option="cache_info"),
    Key("flip_aug", as_bool, _ALL, False, option="flip_aug"),
    Key("color_aug", as_bool, _ALL, False, option="color_aug"),
    Key("random_crop", as_bool, _ALL, False, option="random_crop"),
    Key("face_crop_aug_range", factor_range, _ALL, option="face_crop_aug_range"),
    Key("alpha_mask", as_bool, _ALL, False, option="alpha_mask"),
    Key("custom_attributes", table, _ALL, {}),
    Key("shuffle_caption", as_bool, _ALL, False, option="shuffle_caption"),
    Key("caption_separator", as_str, _ALL, ",", option="caption_separator"),
    Key("keep_tokens", integer(0), _ALL, 0, option="keep_tokens"),
    Key("keep_tokens_separator", as_str, _ALL, "", option="keep_tokens_separator"),
    Key("secondary_separator", as_str, _ALL, option="secondary_separator"),
    Key("enable_wildcard", as_bool, _ALL, False, option="enable_wildcard"),
    Key("caption_prefix", as_str, _ALL, option="caption_prefix"),
    Key("caption_suffix", as_str, _ALL, option="caption_suffix"),
    Key("caption_dropout_rate", fraction, _ALL, 0.0, option="caption_dropout_rate"),
    Key("caption_dropout_every_n_epochs", integer(0), _ALL, 0, option="caption_dropout_every_n_epochs"),
    Key("caption_tag_dropout_rate", fraction, _ALL, 0.0, option="caption_tag_dropout_rate"),
    Key("token_warmup_min", integer(0), _ALL, 1, option="token_warmup_min"),
    Key("token_warmup_step", number(0), _ALL, 0.0, option="token_warmup_step"),
)

KEYS = {key.name: key for key in _KEYS}

RENAMED = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats", "caption_extention": "caption_extension"}
"""Command-line spellings that have another name in the file."""

COMMAND_LINE_ONLY = frozenset(
    {
        "prior_loss_weight",
        "debug_dataset",
        "max_token_length",
        "cache_latents",
        "cache_latents_to_disk",
        "cache_text_encoder_outputs",
        "cache_text_encoder_outputs_to_disk",
        "vae_batch_size",
        "skip_cache_check",
        "seed",
    }
)
"""Settings of the whole run, which the file does not take."""
