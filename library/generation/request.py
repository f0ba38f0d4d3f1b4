"""What one picture is asked to be. Torch-free, so that prompt files are read and checked before anything heavy is loaded."""

from dataclasses import dataclass, replace

MIN_SIDE = 64
"""The smallest side of a picture, in pixels."""
SIDE_STEP = 8
"""Sides are multiples of this many pixels: one latent."""
MAX_STEPS = 1000
"""Sampling steps there can be at most: the timesteps the model was trained with."""


@dataclass(frozen=True)
class ImageRequest:
    """One picture: the text, the size, the noise and how it is drawn.

    Sizes are in pixels. Pictures that agree in `batch_key` can be drawn in one batch.
    """

    prompt: str
    negative_prompt: str = ""
    width: int = 1024
    height: int = 1024
    steps: int = 50
    cfg_scale: float = 7.5
    """Classifier-free guidance; at 1 and below the negative prompt has no effect and each step is twice as fast."""
    seed: int | None = None
    """Seed of this picture's own noise; None draws another picture every time."""
    sampler: str = "ddim"
    original_wh: tuple[int, int] | None = None
    """The original size the model is told, width before height; None: the picture's own."""
    negative_original_wh: tuple[int, int] | None = None
    """The original size told together with the negative prompt; None: the same as for the prompt."""
    crop_top_left: tuple[int, int] = (0, 0)
    network_mul: tuple[float, ...] | None = None
    """Strength of each attached network for this picture; None: as given for the run."""
    guides: tuple[str, ...] = ()
    """Files of the images that control networks follow, one for each of them."""
    raw_prompt: str = ""
    """The line as typed, with its options."""

    @property
    def uses_guidance(self) -> bool:
        """Whether the negative prompt takes part."""
        return self.cfg_scale > 1

    @property
    def batch_key(self) -> tuple[object, ...]:
        """What must be equal for two pictures to be drawn in one batch."""
        return (self.width, self.height, self.steps, self.sampler, self.uses_guidance, self.network_mul)


def rounded_side(side: int, step: int = SIDE_STEP) -> int:
    """Round a side in pixels down to what can be drawn: a multiple of `step`, at least `MIN_SIDE`."""
    return max(MIN_SIDE, side - side % step)


def clamped_steps(steps: int) -> int:
    """Bring a number of sampling steps into 1 … 1000."""
    return min(max(steps, 1), MAX_STEPS)


def with_rounded_size(request: ImageRequest, step: int = SIDE_STEP) -> ImageRequest:
    """Return the request with both sides rounded down by `rounded_side`."""
    return replace(request, width=rounded_side(request.width, step), height=rounded_side(request.height, step))
