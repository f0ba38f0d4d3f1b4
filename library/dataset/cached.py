"""What was encoded once, as training reads it: latents and text outputs, in memory or in the files beside the images.

The files have the layout of sd-scripts. A latent file holds `latents` (C, h, w), `latents_flipped`, `original_size`, `crop_ltrb`,
`alpha_mask` (H, W) in pixels; an image that is trained at several sizes has them once more for each further size, with `_<h>x<w>`
after the names. `latents_posterior` (2C, h, w), the mean in front of the log-variance, is ours.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.dataset.cache_stamps import STAMP_NAME, Stamp, read_stamp
from library.dataset.items import Item
from library.diffusion.posterior import posterior_noise, sample_posterior
from library.files.npz import Arrays, read_npz
from library.models.family import LatentCacheSpec, TextCacheSpec, TextCond
from library.options.errors import UserError

LATENT_NAMES = (
    "latents", "latents_flipped", "original_size", "crop_ltrb", "alpha_mask",
    "latents_posterior", "latents_flipped_posterior", STAMP_NAME,
)  # fmt: skip
"""The arrays of one size of an image; those of the second line are ours."""


@dataclass(frozen=True)
class LatentFiles:
    """Latents on disk, one file per image.

    Args:
        spec: how the family names the files.
        channels: of latents, C.
        stride: pixels per latent position.
        posterior: read mean and log-variance, and draw latents from them.
    """

    spec: LatentCacheSpec
    channels: int
    stride: int
    posterior: bool = False

    def path(self, item: Item) -> str:
        """Return the file of an item: its caching name, its size as width x height of at least four digits, the family's suffix."""
        width, height = item.size
        return f"{item.cache_stem}_{width:04d}x{height:04d}{self.spec.suffix}"

    def shape(self, item: Item) -> tuple[int, int]:
        """Return (h, w) of an item's latents."""
        width, height = item.geometry.bucket
        return height // self.stride, width // self.stride

    def pick(self, arrays: Mapping[str, Any], shape: tuple[int, int]) -> Arrays | None:
        """Return the arrays of one size under their plain names, or None if the file does not hold it."""
        for suffix in (size_suffix(shape), ""):
            latents = arrays.get(f"latents{suffix}")
            if latents is not None and latents.shape == (self.channels, *shape):
                return {name: arrays[name + suffix] for name in LATENT_NAMES if name + suffix in arrays}
        return None

    def read(self, item: Item, *, flipped: bool, seed: int = 0) -> Tensor:
        """Return an item's latents (C, h, w), float32, in cache units.

        Args:
            item: the image.
            flipped: give the mirrored ones.
            seed: of the use they are for; decides the draw where the posterior is cached.

        Raises:
            UserError: the file is gone, damaged, or lacks the size or the mirrored latents.
        """
        path, shape = self.path(item), self.shape(item)
        name = ("latents_flipped" if flipped else "latents") + ("_posterior" if self.posterior else "")
        arrays = read_npz(path, keys={name, name + size_suffix(shape)})
        wanted = (self.channels * (1 + self.posterior), *shape)
        array = next((each for key in (name + size_suffix(shape), name) if (each := arrays.get(key)) is not None
                      and each.shape == wanted), None)  # fmt: skip
        if array is None:
            what = f"{'posterior of the ' if self.posterior else ''}{'mirrored ' if flipped else ''}latents"
            width, height = item.geometry.bucket
            raise UserError(
                f"{path} does not hold the {what} of {item.path} at {width}x{height}. "
                "Leave out --skip_cache_check, or delete it, to have it made again."
            )
        return _drawn(torch.from_numpy(array.astype(np.float32, copy=False)), seed, posterior=self.posterior)

    def read_mask(self, item: Item) -> Tensor:
        """Return the mask (H, W) of an item's pixels, float32 in [0, 1], not mirrored.

        Raises:
            UserError: the file is gone, damaged, or lacks the mask.
        """
        path, (width, height) = self.path(item), item.geometry.bucket
        arrays = read_npz(path, keys={"alpha_mask", "alpha_mask" + size_suffix(self.shape(item))})
        mask = next((array for array in arrays.values() if array.shape == (height, width)), None)
        if mask is None:
            what = f"alpha mask of {item.path} at {width}x{height}"
            raise UserError(f"{path} does not hold the {what}. Leave out --skip_cache_check, or delete it, to have it made again.")
        return torch.from_numpy(mask.astype(np.float32, copy=False))


class LatentsInMemory:
    """Latents held by this process.

    Args:
        latents: by item number, upright and, where the subset mirrors, mirrored; (C, h, w) float32, or (2C, h, w) of posteriors.
        masks: by item number, where transparency masks the loss; (H, W) bytes.
        posterior: the latents are posteriors, mean in front of log-variance, to be drawn from.
    """

    def __init__(
        self, latents: Mapping[int, tuple[Tensor, Tensor | None]], masks: Mapping[int, Tensor], *, posterior: bool = False
    ) -> None:
        self._latents = latents
        self._masks = masks
        self._posterior = posterior

    def read(self, item: Item, *, flipped: bool, seed: int = 0) -> Tensor:
        """Return an item's latents (C, h, w), float32, in cache units; see `LatentFiles.read`."""
        upright, mirrored = self._latents[item.number]
        return _drawn(mirrored if flipped and mirrored is not None else upright, seed, posterior=self._posterior)

    def read_mask(self, item: Item) -> Tensor:
        """Return the mask (H, W) of an item's pixels, float32 in [0, 1], not mirrored."""
        return self._masks[item.number].float() / 255


@dataclass(frozen=True)
class TextFiles:
    """Text outputs on disk, one file per image.

    A file holds all texts its image can have: the first under the names sd-scripts reads, further ones with `_variant1` and so on
    after the names. Which text is where stands in its stamp. The empty caption of uses that drop theirs is the same for all images:
    it lies once in each folder, in a file that is named like an image's file without the image.

    Args:
        spec: how the family names and lays out the files.
        dropping: (section, subset) of items that have the empty caption in some uses.
        is_trusted: files are used that nobody looked into; one that has other texts gives its first.
    """

    spec: TextCacheSpec
    dropping: frozenset[tuple[int, int]] = frozenset()
    is_trusted: bool = False

    def path(self, item: Item) -> str:
        """Return the file of an item."""
        return item.cache_stem + self.spec.suffix

    def empty_path(self, item: Item) -> str:
        """Return the file of the empty caption in the item's folder."""
        return os.path.join(os.path.dirname(item.cache_stem), self.spec.suffix)

    def read(self, item: Item, caption: str) -> TextCond:
        """Return the outputs of one of an item's captions without a batch axis; numbers with a fraction are float32.

        Raises:
            UserError: the file is gone or damaged, or does not hold the caption.
        """
        is_dropped = not caption and (item.section, item.subset) in self.dropping
        path = self.empty_path(item) if is_dropped else self.path(item)
        stamp = read_stamp(path)
        texts = stored_texts(stamp) if stamp else ()
        if texts and caption not in texts and not self.is_trusted:
            raise UserError(f"{path} does not hold the caption {caption!r}. Delete it, and it will be made again.")
        suffix = variant_suffix(texts.index(caption) if caption in texts else 0)
        names = {name: name + suffix for name in self.spec.required_keys}
        found = read_npz(path, keys=set(names.values()))
        missing = set(names.values()) - found.keys()
        if missing:
            raise UserError(f"{path} lacks {', '.join(sorted(missing))}. Delete it, and it will be made again.")
        arrays = {name: found[stored] for name, stored in names.items()}
        return {name: value.float() if value.is_floating_point() else value for name, value in self.spec.unpack(arrays).items()}

    def read_all(self, path: str, texts: Collection[str]) -> dict[str, Arrays]:
        """Return the arrays of some texts of a file, under their plain names.

        Raises:
            UserError: the file is gone or damaged, or does not hold all of them.
        """
        stamp = read_stamp(path)
        stored = stored_texts(stamp) if stamp else ()
        if not set(texts) <= set(stored):
            raise UserError(f"{path} was changed by another program while captions were encoded. Start again when it is done.")
        arrays = read_npz(path)
        return {
            text: {name: arrays[name + variant_suffix(position)] for name in self.spec.required_keys}
            for position, text in enumerate(stored)
            if text in texts
        }


class TextsInMemory:
    """Text outputs held by this process, each caption once.

    Args:
        outputs: by caption, without a batch axis.
    """

    def __init__(self, outputs: Mapping[str, TextCond]) -> None:
        self._outputs = outputs

    def read(self, caption: str) -> TextCond:
        """Return the outputs of a caption, without a batch axis."""
        return self._outputs[caption]


def _drawn(latents: Tensor, seed: int, *, posterior: bool) -> Tensor:
    """Draw latents with the noise that images encoded while training get, so that both give the same."""
    if not posterior:
        return latents
    channels, height, width = latents.shape
    return sample_posterior(latents, posterior_noise([seed], (channels // 2, height, width))[0])


def size_suffix(shape: tuple[int, int]) -> str:
    """Return what follows the names of arrays that belong to one of several sizes."""
    return f"_{shape[0]}x{shape[1]}"


def stored_texts(stamp: Stamp) -> tuple[str, ...]:
    """Return the texts of a text file, in the order of their suffixes."""
    return (stamp.get("caption", ""), *stamp.get("variants", ()))


def variant_suffix(position: int) -> str:
    """Return what follows the names of the arrays of the text at a position; nothing for the first, so that sd-scripts reads it."""
    return f"_variant{position}" if position else ""
