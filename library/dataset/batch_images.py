"""The pictures of a batch as tensors: images, masks and control images, placed, coloured and mirrored together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.dataset.augmentation import change_colors
from library.dataset.buckets import crop_top_left, true_crop_top_left
from library.dataset.dataset import Dataset, Draws
from library.dataset.images import BLACK, fit, load_placed, read_pixels, to_mask, to_model_range
from library.dataset.items import Item
from library.models.family import SizeConditioning

Pairs = Sequence[tuple[Item, Draws]]
"""The images of a batch with what chance decides for them."""


@dataclass(frozen=True)
class BatchImages:
    """What a batch has of pixels."""

    images: Tensor | None
    latents: Tensor | None
    masks: Tensor | None
    conditioning: Tensor | None


def load_images(dataset: Dataset, pairs: Pairs) -> BatchImages:
    """Load what a batch has of pixels, or of latents where these are cached.

    Raises:
        UserError: an image or cache file cannot be read; it is named.
    """
    latents = dataset.latents
    masked = any(dataset.is_masked(item) for item, _ in pairs)
    conditioning = _conditioning(dataset, pairs)
    if latents is None:
        images = [_image(dataset, item, draw) for item, draw in pairs]
        masks = torch.stack([mask for _, mask in images]) if masked else None
        return BatchImages(torch.stack([image for image, _ in images]), None, masks, conditioning)
    read = [latents.read(item, flipped=draw.flipped, seed=draw.seed) for item, draw in pairs]
    masks = torch.stack([_cached_mask(dataset, item, draw) for item, draw in pairs]) if masked else None
    return BatchImages(None, torch.stack(read), masks, conditioning)


def size_conditioning(dataset: Dataset, pairs: Pairs) -> SizeConditioning:
    """Return the sizes and crops SDXL is told."""
    crops = [
        true_crop_top_left(item.geometry.bucket, draw.placement, draw.flipped)
        if dataset.config.true_crop_conditioning
        else crop_top_left(item.geometry, draw.flipped)
        for item, draw in pairs
    ]
    return SizeConditioning(
        original_hw=torch.tensor([item.size[::-1] for item, _ in pairs], dtype=torch.int64),
        crop_top_left=torch.tensor(crops, dtype=torch.int64),
        target_hw=torch.tensor([item.geometry.bucket[::-1] for item, _ in pairs], dtype=torch.int64),
    )


def _image(dataset: Dataset, item: Item, draws: Draws) -> tuple[Tensor, Tensor]:
    """Return an image (3, H, W) in [-1, 1] and its mask (H, W) in [0, 1]."""
    pixels, alpha = load_placed(
        item.path, item.orientation, item.geometry.bucket, draws.placement, dataset.interpolation(item),
        with_mask=item.has_alpha and dataset.is_masked(item),
    )  # fmt: skip
    if draws.color is not None:
        pixels = change_colors(pixels, draws.color)
    mask = _whole(item) if alpha is None else torch.from_numpy(to_mask(_mirrored(alpha, draws)))
    return torch.from_numpy(to_model_range(_mirrored(pixels, draws))), mask


def _cached_mask(dataset: Dataset, item: Item, draws: Draws) -> Tensor:
    """Return a mask that was encoded along; what may not be transparent needs none, and a mask nobody asked for is not used."""
    if dataset.latents is None or not (item.has_alpha and dataset.is_masked(item)):
        return _whole(item)
    mask = dataset.latents.read_mask(item)
    return mask.flip(-1) if draws.flipped else mask


def _conditioning(dataset: Dataset, pairs: Pairs) -> Tensor | None:
    if any(item.conditioning_path is None for item, _ in pairs):
        return None
    return torch.stack([_control(dataset, item, draw) for item, draw in pairs])


def _control(dataset: Dataset, item: Item, draws: Draws) -> Tensor:
    """Return a control image (3, H, W) in [-1, 1]; its transparent parts are black, which means "not here" in masks and maps."""
    pixels = read_pixels(str(item.conditioning_path), backdrop=BLACK)
    placed = fit(pixels, item.geometry.bucket, draws.placement, dataset.interpolation(item))
    return torch.from_numpy(to_model_range(_mirrored(placed, draws)))


def _whole(item: Item) -> Tensor:
    width, height = item.geometry.bucket
    return torch.ones(height, width)


def _mirrored(pixels: np.ndarray[Any, np.dtype[np.uint8]], draws: Draws) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return pixels[:, ::-1] if draws.flipped else pixels
