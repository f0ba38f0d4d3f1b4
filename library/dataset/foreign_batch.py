"""One batch as sd-scripts' datasets give it, a dictionary, checked and turned into ours."""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from library.dataset.batch import Batch
from library.models.family import Family, SizeConditioning, TextCond
from library.options.errors import UserError

_NEAR_ONE = 1.01
"""Resampling may go a little beyond the range."""


def read_batch(given: Any, place: str, family: Family, *, has_network: bool, follows_images: bool = False) -> Batch:
    """Turn a batch of a foreign dataset into ours; its draw seeds are left empty.

    Args:
        given: by the dataset.
        place: what the batch is called in messages.
        family: of the model the batch is for.
        has_network: whether a network is trained, which a batch may set the strength of.
        follows_images: whether that network learns to follow the batch's control images.

    Raises:
        UserError: a key is missing or its value cannot be used; batch and key are named.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"--dataset_class: {place} must be a dictionary, but it is a {type(given).__name__}.")
    return _Reading(given, place, family).batch(has_network, follows_images)


class _Reading:
    """Reads keys of one batch; B is found from its images or latents."""

    def __init__(self, given: Mapping[str, Any], place: str, family: Family) -> None:
        self.given = given
        self.place = place
        self.family = family
        self.size = 0

    def batch(self, has_network: bool, follows_images: bool) -> Batch:
        images, latents = self._pictures()
        cond = self._text_cond()
        return Batch(
            images=images,
            latents=latents,
            captions=self._captions(needed=cond is None),
            text_cond=cond,
            sizes=SizeConditioning(*(self._sizes(key) for key in ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw"))),
            loss_weights=self._per_image("loss_weights"),
            draw_seeds=[],
            image_keys=[str(key) for key in self._listed("image_keys") or ()],
            masks=self._tensor("alpha_masks", "(B, H, W)", (None, None)),
            conditioning=self._conditioning(None if not follows_images else self._size_of(images, latents)),
            network_multiplier=self._strength(has_network),
            custom_attributes=self._attributes(),
        )

    def _pictures(self) -> tuple[Tensor | None, Tensor | None]:
        """Read images or latents, of which latents are taken where both are there, and learn the size of the batch."""
        channels, step = self.family.latent_channels, self.family.size_multiple
        latents = self._tensor("latents", f"(B, {channels}, h, w)", (channels, None, None))
        images = None if latents is not None else self._tensor("images", "(B, 3, H, W)", (3, None, None))
        found = images if latents is None else latents
        key = "images" if latents is None else "latents"
        if found is None:
            self._fail("images", "is missing, and so is latents; a batch has one of the two")
        if not len(found):
            self._fail(key, "has no images")
        unit = step if latents is None else step // self.family.latent_stride
        if found.shape[-2] % unit or found.shape[-1] % unit:
            self._fail(key, f"has sides that are no multiples of {unit}: {tuple(found.shape)}")
        if images is not None and images.abs().max() > _NEAR_ONE:
            self._fail("images", f"must lie in [-1, 1], but has values up to {images.abs().max():g}")
        self.size = len(found)
        return images, latents

    def _size_of(self, images: Tensor | None, latents: Tensor | None) -> tuple[int, int]:
        """Return height and width in pixels."""
        found, stride = (images, 1) if latents is None else (latents, self.family.latent_stride)
        height, width = (0, 0) if found is None else found.shape[-2:]
        return height * stride, width * stride

    def _conditioning(self, followed: tuple[int, int] | None) -> Tensor | None:
        """Read control images or masks; where control images are followed, they must be there in this height and width."""
        found = self._tensor("conditioning_images", "(B, 3, H, W)", (3, None, None))
        if followed is not None and found is None:
            self._fail("conditioning_images", "is missing; it has the control images that the network is to follow")
        if followed is not None and found is not None and tuple(found.shape[-2:]) != followed:
            self._fail("conditioning_images", f"must be as large as the pictures, {followed}, not {tuple(found.shape[-2:])}")
        return found

    def _text_cond(self) -> TextCond | None:
        listed = self._present("text_encoder_outputs_list")
        if listed is None:
            return None
        keys = sorted(self.family.text_cache.required_keys)  # sd-scripts' order
        if not isinstance(listed, list | tuple) or len(listed) != len(keys):
            self._fail("text_encoder_outputs_list", f"must be a list of {len(keys)} tensors: {', '.join(keys)}")
        for name, tensor in zip(keys, listed, strict=True):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or len(tensor) != self.size:
                self._fail("text_encoder_outputs_list", f"must have a float tensor of {self.size} rows for {name}")
        arrays = {name: each.detach().cpu().float().numpy() for name, each in zip(keys, listed, strict=True)}
        cond = self.family.text_cache.unpack(arrays)
        self._check_shapes(cond)
        return cond

    def _check_shapes(self, cond: TextCond) -> None:
        """See that texts are as wide as the denoiser wants them, and have the same number of tokens."""
        tokens = next((tensor.shape[1] for tensor in cond.values() if tensor.dim() == 3), 0)
        wanted = {name: (self.size, *shape) for name, shape in self.family.text_shapes(tokens).items()}
        found = {name: tuple(tensor.shape) for name, tensor in cond.items()}
        if found != wanted:
            told = [", ".join(f"{name} {shape}" for name, shape in shapes.items()) for shapes in (wanted, found)]
            self._fail("text_encoder_outputs_list", f"must have the shapes {told[0]} for this model, not {told[1]}")

    def _captions(self, *, needed: bool) -> list[str]:
        captions = self._listed("captions")
        if captions is None and needed:
            self._fail(
                "captions", "is missing, and so is text_encoder_outputs_list; texts come as one of the two, not as token ids"
            )
        if captions is None:
            return [""] * self.size
        if not all(isinstance(caption, str) for caption in captions):
            self._fail("captions", "must be a list of texts")
        return captions

    def _sizes(self, key: str) -> Tensor:
        values = self._numbers(key, "two whole numbers for each image")
        if values is None:
            self._fail(key, "is missing; it has height and width (or top and left) in pixels of each image")
        if tuple(values.shape) != (self.size, 2):
            self._fail(key, f"must have the shape ({self.size}, 2), not {tuple(values.shape)}")
        return values.long()

    def _per_image(self, key: str) -> Tensor:
        values = self._numbers(key, "one number for each image")
        if values is None:
            return torch.ones(self.size)
        if tuple(values.shape) != (self.size,):
            self._fail(key, f"must have the shape ({self.size},), not {tuple(values.shape)}")
        return values.float()

    def _strength(self, has_network: bool) -> float:
        values = self._per_image("network_multipliers").unique().tolist()
        if len(values) > 1:
            self._fail("network_multipliers", f"must be the same for all images of a batch, not {values}")
        if values != [1.0] and not has_network:
            self._fail("network_multipliers", "must be 1 where the model itself is trained and there is no network")
        return float(values[0])

    def _attributes(self) -> list[Mapping[str, Any]]:
        attributes = self._listed("custom_attributes")
        if attributes is None:
            return [{}] * self.size
        if not all(isinstance(each, Mapping) for each in attributes):
            self._fail("custom_attributes", "must be a list of dictionaries")
        return attributes

    def _tensor(self, key: str, meant: str, sides: tuple[int | None, ...]) -> Tensor | None:
        """Read a float tensor whose first axis is the images, and whose others have these lengths; None allows any."""
        value = self._present(key)
        if value is None:
            return None
        if not isinstance(value, Tensor) or not value.is_floating_point():
            self._fail(key, f"must be a float tensor {meant}, not {_kind(value)}")
        fits = value.dim() == len(sides) + 1 and all(
            wanted in (None, side) for wanted, side in zip(sides, value.shape[1:], strict=True)
        )
        if not fits or (self.size and len(value) != self.size):
            self._fail(key, f"must be a float tensor {meant}{f' with B = {self.size}' * bool(self.size)}, not {tuple(value.shape)}")
        return value.detach().cpu().float()

    def _numbers(self, key: str, meant: str) -> Tensor | None:
        value = self._present(key)
        if value is None:
            return None
        try:
            if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
                value = torch.stack(list(value))
            return torch.as_tensor(value).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            self._fail(key, f"must have {meant}, not {_kind(value)}")

    def _listed(self, key: str) -> list[Any] | None:
        value = self._present(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != self.size:
            self._fail(key, f"must be a list with one entry for each of the {self.size} images")
        return list(value)

    def _present(self, key: str) -> Any:
        return self.given.get(key)

    def _fail(self, key: str, reason: str) -> NoReturn:
        raise UserError(f"--dataset_class: {key} of {self.place} {reason}.")


def _kind(value: Any) -> str:
    return f"{value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
