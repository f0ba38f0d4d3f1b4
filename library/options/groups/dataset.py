"""Options about where training images come from."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import field_validator

from library.options.declare import CommaList, OptionGroup, PathText, flag, option


class DatasetOptions(OptionGroup):
    """Sources, batch size and loading; a dataset file overrides the folders and falls back on the other values."""

    topic: ClassVar[str] = "Dataset source"

    dataset_config: Path | None = option(None, "Dataset definition, a .toml or .json file; replaces the folder options below.")
    train_data_dir: PathText = option(None, "Folder whose sub-folders <repeats>_<class tokens> hold the training images.")
    reg_data_dir: PathText = option(None, "Folder whose sub-folders <repeats>_<class tokens> hold regularisation images.")
    in_json: PathText = option(None, "Metadata file (.json, .jsonl) with the captions and tags of images in --train_data_dir.")
    conditioning_data_dir: PathText = option(None, "Folder with control images.")
    dataset_repeats: int = option(1, "Uses of each image per epoch where the dataset file says nothing.", ge=1)
    dataset_class: str | None = option(
        None, "Dotted path of a dataset class of your own, whose batches replace those of images and caption files."
    )
    train_batch_size: int = option(1, "Images per device and step.", ge=1)
    resolution: Annotated[str | None, CommaList()] = option(None, "Training size in pixels: one number, or width,height.")
    cache_info: bool = flag("Remember size and caption of every image in metadata_cache.json inside the image folder.")
    debug_dataset: bool = flag(
        "Write pictures and captions of the first batches into debug_dataset in the output folder, and stop; no model is loaded."
    )
    prior_loss_weight: float = option(1.0, "Weight of the loss on regularisation images.", ge=0)
    max_data_loader_n_workers: int = option(
        8, "Most worker processes that load data; 0 loads in the main process. Never more than there are processors.", ge=0
    )
    persistent_data_loader_workers: bool = flag("Keep the worker processes between epochs.")

    @field_validator("resolution")
    @classmethod
    def _is_a_size(cls, text: str | None) -> str | None:
        if text is not None:
            parse_size(text)
        return text

    @property
    def size(self) -> tuple[int, int] | None:
        """The training size as (width, height) in pixels, or None when only the dataset file knows it."""
        return None if self.resolution is None else parse_size(self.resolution)


def parse_size(text: str) -> tuple[int, int]:
    """Read `size` or `width,height`.

    Returns:
        (width, height) in pixels, both at least 1.

    Raises:
        ValueError: the text is neither one nor two positive whole numbers.
    """
    numbers = [part.strip() for part in text.split(",")]
    if len(numbers) > 2 or not all(number.isascii() and number.isdigit() and int(number) > 0 for number in numbers):
        raise ValueError("a size in pixels is one whole number or two with a comma, such as 1024 or 832,1216")
    return int(numbers[0]), int(numbers[-1])
