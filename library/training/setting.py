"""What a training run is made of, as it is handed from verb to verb."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from library.dataset.dataset import Dataset
from library.diffusion.objective import Objective
from library.memory.codecs import CODECS
from library.memory.packed import hold_packed
from library.models.control import Control
from library.models.family import Family
from library.models.prompt_weights import PromptStyle
from library.models.weights import Hold
from library.options.groups.precision import StepPrecisionOptions
from library.options.scripts import TrainingOptions
from library.training.accelerator import DTypes
from library.training.events import EventLog
from library.training.outputs import RunLength, save_stem
from library.training.position import Position
from library.training.trainable import Trainable

MetadataAt = Callable[[str, Position], dict[str, str]]
"""(file stem, place) to the metadata of a model saved there."""


@dataclass(frozen=True)
class Setting:
    """What is known before anything is trained: options, data and model, and how long the run is."""

    options: TrainingOptions
    accelerator: Accelerator
    dtypes: DTypes
    seed: int
    family: Family
    objective: Objective
    dataset: Dataset
    batches_per_epoch: int
    length: RunLength
    started_at: float
    """Unix time in seconds."""
    events: EventLog
    """Of `--log_events`; writes in the main process only."""

    @property
    def prompt_style(self) -> PromptStyle:
        """How sample prompts are encoded: as captions are."""
        return PromptStyle.of_training(self.options.model.max_token_length or 75)

    @property
    def caption_style(self) -> PromptStyle | None:
        """How captions are encoded where their brackets are weights; None where brackets are text."""
        return self.prompt_style if self.options.caption.weighted_captions else None

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The type models compute in where it differs from that of trained weights; None without mixed precision."""
        return None if self.dtypes.compute == torch.float32 else self.dtypes.compute


@dataclass(frozen=True)
class PartDTypes:
    """The types in which parts of the model are loaded: trained ones in that of trained weights, others in the computation's."""

    denoiser: torch.dtype
    text_encoders: torch.dtype
    hold_denoiser: Hold | None = None
    """What the denoiser's layers keep instead of some weights; None: the weights themselves."""
    hold_text_encoders: Hold | None = None
    """The same for text encoders that stay loaded; those that only fill caches are loaded as they are."""

    @classmethod
    def frozen(cls, precision: StepPrecisionOptions, compute: torch.dtype) -> "PartDTypes":
        """Return the types of a model of which nothing is trained: that of the computation, or fewer bits where wanted.

        Args:
            precision: says what is held in fewer bits.
            compute: the type of the computation.
        """
        holds = (
            None if quant is None else hold_packed(CODECS[quant])
            for quant in (precision.denoiser_quant, precision.text_encoder_quant)
        )
        return cls(compute, compute, *holds)


@dataclass(frozen=True)
class Trained:
    """What a recipe trains."""

    trainable: Trainable
    groups: Sequence[dict[str, Any]]
    """Parameter groups for the optimizer, each with its rate."""
    descriptions: Sequence[str | None]
    """What each group trains, for the log."""
    trains_text: bool
    """Whether gradients flow through the text encoders."""
    extension: str
    """Of the files that `trainable` saves, with its dot; "" for folders."""
    may_skip: bool = False
    """Whether a batch may leave trained parameters without a gradient, which several processes then have to look for."""
    is_divided: bool = False
    """Whether each process has a share of every parameter; see `library.training.sharding`."""
    control: Control | None = None
    """The network that makes the model follow control images, where one is trained."""


def beside_output(setting: Setting, ending: str) -> Path:
    """Return where something goes that a run writes about itself; runs of different `--output_name` share a folder.

    Args:
        setting: of the run.
        ending: what follows the name and a hyphen.
    """
    output = setting.options.output
    return Path(output.output_dir or ".") / f"{save_stem('final', 0, output.output_name or None)}-{ending}"
