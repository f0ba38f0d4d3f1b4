"""Options about sample images during training."""

from typing import Annotated, ClassVar, Literal

from library.options.declare import OptionGroup, PathText, SameAsUnset, flag, option

SamplerName = Literal[
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
]  # fmt: skip
"""Samplers by the names that command lines use; a `k_` name means the same as the one without."""


class SampleOptions(OptionGroup):
    """Sample images during training."""

    topic: ClassVar[str] = "Sample images during training"

    sample_prompts: PathText = option(None, "File with the prompts: .txt with one per line, .toml or .json.")
    sample_every_n_steps: Annotated[int | None, SameAsUnset(0)] = option(None, "Draw samples every N steps.")
    sample_every_n_epochs: Annotated[int | None, SameAsUnset(0)] = option(
        None, "Draw samples every N epochs; replaces --sample_every_n_steps."
    )
    sample_at_first: bool = flag("Draw samples before the first step too.")
    sample_sampler: SamplerName = option("ddim", "Sampler of the samples.")
