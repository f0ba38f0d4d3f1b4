"""What one training step receives from the data: images or cached latents, captions or cached text, sizes and weights."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from library.models.family import SizeConditioning, TextCond


@dataclass(frozen=True)
class Batch:
    """B images of one bucket, all on one device; exactly one of `images` and `latents` is set.

    Tensors are on the CPU, pinned where a GPU will want them, until `to` is called.
    """

    images: Tensor | None
    """(B, 3, H, W) float32 in [-1, 1]."""
    latents: Tensor | None
    """(B, C, h, w) float32 in cache units (SDXL: unscaled)."""
    captions: list[str]
    text_cond: TextCond | None
    """Cached text outputs; None when the captions must be encoded live."""
    sizes: SizeConditioning
    loss_weights: Tensor
    """(B,) float32: regularisation weight times the share that makes the mean over all processes' images exact."""
    draw_seeds: list[int]
    """One 64-bit seed per image, a function of (seed, epoch, image) alone: noise, timestep and posterior are drawn from it."""
    image_keys: list[str]
    """The image files, for messages."""
    masks: Tensor | None = None
    """(B, H, W) float32 in [0, 1], from alpha channels, one value per pixel of the image: ones for images without transparency;
    None where no image of the batch is to have a mask."""
    conditioning: Tensor | None = None
    """(B, 3, H, W) float32 in [-1, 1]: the control or mask image of each image, resized, cropped and mirrored with it."""
    network_multiplier: float = 1.0
    """Strength of the network for this batch."""
    custom_attributes: list[Mapping[str, Any]] = field(default_factory=list)
    """What the dataset file says of each image besides."""
    section: int = 0
    """Which dataset of the file the images are of."""

    @property
    def size(self) -> int:
        """The number of images, B."""
        return len(self.captions)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`; copies from pinned memory do not wait."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from where a GPU copies it without anybody waiting."""
        return self.mapped(Tensor.pin_memory)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors of the batch."""
        found: list[Tensor] = []

        def noted(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.mapped(noted)
        yield from found

    def mapped(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with another tensor in the place of each."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else move(tensor)

        sizes = self.sizes
        return replace(
            self,
            images=moved(self.images),
            latents=moved(self.latents),
            text_cond=None if self.text_cond is None else {name: move(tensor) for name, tensor in self.text_cond.items()},
            sizes=SizeConditioning(move(sizes.original_hw), move(sizes.crop_top_left), move(sizes.target_hw)),
            loss_weights=move(self.loss_weights),
            masks=moved(self.masks),
            conditioning=moved(self.conditioning),
        )
