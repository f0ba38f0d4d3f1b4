"""Draws pictures: text to conditioning, noise to latents, latents to pixels. Knows a model only through its family.

Shape legend: B pictures of one batch, C latent channels, h and w latent height and width, L text tokens.
"""

import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from library.diffusion.samplers import PredictionType, image_generators, make_sampler, sampler_step, start_noise
from library.generation.controls import Controls
from library.generation.request import ImageRequest, with_rounded_size
from library.models.family import Components, Family, SizeConditioning, TextCond
from library.models.prompt_weights import PromptStyle

logger = logging.getLogger(__name__)

StepCallback = Callable[[int, int], None]
"""Called after every sampling step with the steps done and the steps in all."""


@dataclass(frozen=True)
class EncodedPrompt:
    """One request's text, encoded; tensors have a batch axis of 1, both halves the same L."""

    positive: TextCond
    negative: TextCond | None
    """None where the request uses no guidance."""


class Pipeline:
    """A loaded model that turns requests into pictures.

    A picture depends on its own request alone: its noise, and the noise ancestral samplers add on the way, come from its own
    generator on the CPU in float32, and its text is encoded by itself. So batches, devices and number types differ by rounding.

    Args:
        family: the architecture.
        components: the loaded parts. For `draw` with already encoded prompts the text encoders may have been freed.
        device: where the parts are.
        prediction_type: "epsilon" or "v_prediction".
        zero_terminal_snr: whether the noise schedule ends in pure noise.
        style: how prompts become conditioning.
        autocast_dtype: run text encoders and denoiser under autocast to this type; None: in the type they have.
        vae_batch_size: pictures decoded at once.
        controls: control networks that the pictures' guide images go to.
    """

    def __init__(
        self,
        family: Family,
        components: Components,
        *,
        device: torch.device,
        prediction_type: PredictionType = "epsilon",
        zero_terminal_snr: bool = False,
        style: PromptStyle | None = None,
        autocast_dtype: torch.dtype | None = None,
        vae_batch_size: int = 1,
        controls: Controls | None = None,
    ) -> None:
        self.family = family
        self.components = components
        self.device = device
        self.prediction_type = prediction_type
        self.zero_terminal_snr = zero_terminal_snr
        self.style = style or PromptStyle()
        self.autocast_dtype = autocast_dtype
        self.vae_batch_size = vae_batch_size
        self.controls = controls
        self.num_not_finite = 0
        """Pictures so far whose values were not finite; they come out black."""

    @torch.no_grad()
    def encode(self, requests: Sequence[ImageRequest]) -> list[EncodedPrompt]:
        """Run the text encoders, each request by itself.

        Raises:
            ValueError: a text encoder was freed; encode before that and hand the result to `draw`.
        """
        for encoder in self.components.text_encoders:
            _loaded(encoder, "text encoder")
        with self._autocast():
            return [self._encode_one(request) for request in requests]

    def _encode_one(self, request: ImageRequest) -> EncodedPrompt:
        texts = [request.prompt, request.negative_prompt] if request.uses_guidance else [request.prompt]
        conds = self.family.encode_prompts(texts, self.components.text_encoders, self.style)
        return EncodedPrompt(conds[0], conds[1] if request.uses_guidance else None)

    @torch.no_grad()
    def draw(
        self,
        requests: Sequence[ImageRequest],
        on_step: StepCallback | None = None,
        *,
        encoded: Sequence[EncodedPrompt] | None = None,
    ) -> list[Image.Image]:
        """Draw one picture per request, in order.

        Requests of equal `batch_key` and text length share a batch; the others follow one another.

        Args:
            requests: what to draw.
            on_step: told of every sampling step of every batch.
            encoded: the requests' text from `encode`; None: it is encoded now.

        Returns:
            RGB pictures; one whose values are not finite is black, is counted in `num_not_finite` and named in the log. Sides the
            model cannot draw are rounded down to the family's `size_multiple`.
        """
        requests = [self._drawable(request) for request in requests]
        encoded = self.encode(requests) if encoded is None else encoded
        pictures: dict[int, Image.Image] = {}
        for indices in _equal_groups(requests, encoded):
            group = [requests[i] for i in indices]
            with self._controlled(group):
                latents = self._denoise(group, [encoded[i] for i in indices], on_step)
            pictures.update(zip(indices, self._decode(latents, group), strict=True))
        return [pictures[i] for i in range(len(requests))]

    def _drawable(self, request: ImageRequest) -> ImageRequest:
        multiple = self.family.size_multiple
        rounded = with_rounded_size(request, multiple)
        if rounded != request:
            logger.warning(
                f"{request.width}x{request.height} is drawn as {rounded.width}x{rounded.height}; "
                f"sides of {self.family.name} pictures are multiples of {multiple} pixels."
            )
        return rounded

    def _denoise(self, requests: Sequence[ImageRequest], encoded: Sequence[EncodedPrompt], on_step: StepCallback | None) -> Tensor:
        """Run the sampler; returns float32 latents (B, C, h, w) in model units."""
        first = requests[0]
        denoiser = _loaded(self.components.denoiser, "denoiser")
        cond, sizes = self._conditioning(requests, encoded)
        generators = image_generators([secrets.randbits(32) if request.seed is None else request.seed for request in requests])
        sampler = make_sampler(first.sampler, self.prediction_type, self.zero_terminal_snr)
        sampler.set_timesteps(first.steps, device=self.device)
        scales = torch.tensor([request.cfg_scale for request in requests], device=self.device).view(-1, 1, 1, 1)

        latents: Tensor = start_noise(generators, self._latent_shape(first)).to(self.device) * sampler.init_noise_sigma
        for done, t in enumerate(sampler.timesteps, 1):
            noisy = sampler.scale_model_input(torch.cat([latents] * 2) if first.uses_guidance else latents, t)
            if self.controls is not None:
                self.controls.before_step(done - 1, len(sampler.timesteps))
            with self._autocast():
                predicted = self.family.predict(denoiser, noisy, t.expand(len(noisy)), cond, sizes).float()
            if first.uses_guidance:
                uncond, conditioned = predicted.chunk(2)
                predicted = uncond + scales * (conditioned - uncond)
            latents = sampler_step(sampler, predicted, t, latents, generators)
            if on_step is not None:
                on_step(done, len(sampler.timesteps))
        return latents

    @contextmanager
    def _controlled(self, requests: Sequence[ImageRequest]) -> Iterator[None]:
        """Let control networks follow the guide images of a batch."""
        if self.controls is None:
            yield
            return
        with self._autocast():
            self.controls.begin(requests)
        try:
            yield
        finally:
            self.controls.end()

    def _latent_shape(self, request: ImageRequest) -> tuple[int, int, int]:
        stride = self.family.latent_stride
        return self.family.latent_channels, request.height // stride, request.width // stride

    def _conditioning(
        self, requests: Sequence[ImageRequest], encoded: Sequence[EncodedPrompt]
    ) -> tuple[TextCond, SizeConditioning]:
        """Stack the text and the sizes: the negative half first, then the positive one; only the latter without guidance."""
        halves = [_sizes(request, negative=False) for request in requests]
        conds = [one.positive for one in encoded]
        if requests[0].uses_guidance:
            halves = [_sizes(request, negative=True) for request in requests] + halves
            conds = [one.negative for one in encoded if one.negative is not None] + conds
        text = {key: torch.cat([cond[key] for cond in conds]).to(self.device) for key in conds[0]}
        return text, SizeConditioning(*(torch.tensor(column) for column in zip(*halves, strict=True))).to(self.device)

    def _decode(self, latents: Tensor, requests: Sequence[ImageRequest]) -> Iterator[Image.Image]:
        vae = _loaded(self.components.vae, "VAE")
        for start in range(0, len(latents), self.vae_batch_size):
            part = latents[start : start + self.vae_batch_size]
            images = self._decode_batch(vae, part)
            for image, request in zip(images, requests[start:], strict=False):
                if not image.isfinite().all():
                    self.num_not_finite += 1
                    logger.error(_not_finite_sentence(request))
                yield _to_picture(image)

    def _decode_batch(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Decode to float32 (B, 3, H, W) in [-1, 1]; once more in float32 where the VAE's own type overflowed."""
        dtype = next(vae.parameters()).dtype
        images = self.family.decode_latents(vae, latents)
        if dtype == torch.float32 or images.isfinite().all() or not latents.isfinite().all():
            return images
        logger.warning(f"The VAE overflowed in {dtype}; the picture is decoded again in float32 (--no_half_vae does so at once).")
        try:
            return self.family.decode_latents(vae.to(torch.float32), latents)
        finally:
            vae.to(dtype)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)


def _loaded(part: nn.Module | None, name: str) -> nn.Module:
    if part is None:
        raise ValueError(f"The {name} is not loaded, so nothing can be drawn")
    return part


def _equal_groups(requests: Sequence[ImageRequest], encoded: Sequence[EncodedPrompt]) -> list[list[int]]:
    """Indices of requests that may share a batch, groups in the order of their first request."""
    groups: dict[object, list[int]] = {}
    for index, (request, one) in enumerate(zip(requests, encoded, strict=True)):
        shapes = tuple(tensor.shape for tensor in one.positive.values())
        groups.setdefault((request.batch_key, shapes), []).append(index)
    return list(groups.values())


def _sizes(request: ImageRequest, *, negative: bool) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Original height and width, crop top and left, target height and width."""
    own = (request.width, request.height)
    original = request.original_wh or own
    if negative and request.negative_original_wh is not None:
        original = request.negative_original_wh
    return original[::-1], request.crop_top_left, own[::-1]


def _to_picture(image: Tensor) -> Image.Image:
    """Turn (3, H, W) in [-1, 1] into 8-bit RGB; values that are not finite become black."""
    levels = (image.nan_to_num(-1, -1, -1).clamp(-1, 1) / 2 + 0.5).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def _not_finite_sentence(request: ImageRequest) -> str:
    return (
        f'The picture of "{request.prompt}" (seed {request.seed}) is black: its values are not finite. '
        "Draw it with --bf16 or without --fp16; if it stays black, the checkpoint or a network is damaged."
    )
