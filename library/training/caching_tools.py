"""What the caching tools share: the dataset as training will see it."""

from library.dataset.dataset import Dataset
from library.options.dataset_config import DatasetConfig
from library.options.scripts import CacheLatentsOptions, CacheTextEncoderOutputsOptions

_SEED = 0
"""Where none is given: not a random one, so that two runs of a tool make the same entries."""


def open_to_cache(options: CacheLatentsOptions | CacheTextEncoderOutputsOptions, definition: DatasetConfig) -> Dataset:
    """List the images of a dataset to be cached.

    Args:
        options: of the tool.
        definition: the dataset definition, checked.

    Raises:
        UserError: images or caption files cannot be used; all of them are named.
    """
    return Dataset(definition, _SEED if options.length.seed is None else options.length.seed)
