"""Dataset definitions read with options as a person would give them."""

from pathlib import Path
from typing import Any

import pytest

from library.options.dataset_config import DatasetConfig, load_dataset_config
from library.options.errors import UsageError
from library.options.groups.cache import CacheOptions
from library.options.groups.caption import CaptionOptions
from library.options.groups.dataset import DatasetOptions
from library.options.groups.image import ImageOptions
from library.options.groups.validation import ValidationOptions


def load(path: Path | None, cache: dict[str, Any] | None = None, *, masked_loss: bool = False, **options: Any) -> DatasetConfig:
    """Read a dataset file, or the folders among the options, with the rest of the options as fallbacks."""

    def group(kind: type, **more: Any) -> Any:
        return kind(**{name: value for name, value in options.items() if name in kind.model_fields}, **more)

    return load_dataset_config(
        group(DatasetOptions, dataset_config=path),
        group(CaptionOptions),
        group(ImageOptions),
        CacheOptions(**(cache or {})),
        validation=group(ValidationOptions),
        masked_loss=masked_loss,
    )


def problems(path: Path | None, **options: Any) -> list[str]:
    """Return what is wrong, which must be something."""
    with pytest.raises(UsageError) as caught:
        load(path, **options)
    return list(caught.value.problems)
