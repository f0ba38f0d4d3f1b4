"""Sample images while training, so that a person sees what the model has learned."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from library.files.atomic import atomic_write
from library.generation.pipeline import EncodedPrompt, Pipeline
from library.generation.request import ImageRequest
from library.options.errors import UserError
from library.training.position import Position
from library.training.preview_plan import PreviewPlan, sample_name
from library.training.trainable import Trainable

log = logging.getLogger(__name__)


@dataclass
class Previews:
    """The observer that draws. Prompts are dealt out to the processes in turn.

    Args:
        plan: when.
        requests: what, in the order of the prompt file.
        pipeline: draws with the models being trained.
        encoded: the prompts' text where the text encoders do not change; None: encoded anew each time.
        vae: moved to the device for drawing and back to where it was.
        trainable: put in evaluation mode while drawing.
        averaged: enters the evaluation mode of optimizers that train other weights than they want looked at.
        folder: the output folder; pictures go to its `sample` folder.
        output_name: first part of the file names, or None.
        process_index, num_processes: which of the prompts are drawn here.
        show: receives (index in the prompt file, picture, prompt) of each picture, for trackers.
    """

    plan: PreviewPlan
    requests: Sequence[ImageRequest]
    pipeline: Pipeline
    encoded: Sequence[EncodedPrompt] | None
    vae: nn.Module
    trainable: Trainable
    averaged: Callable[[], AbstractContextManager[None]]
    folder: Path
    output_name: str | None
    process_index: int
    num_processes: int
    show: Callable[[int, Image.Image, str], None]

    def before_training(self, position: Position) -> None:
        """Draw before the first step where that was asked for; a resumed run has drawn already."""
        if self.plan.at_first and position.update == 0:
            self.draw(f"e{0:06d}")

    def after_update(self, position: Position) -> None:
        """Draw where the plan has a step."""
        if self.plan.is_due_after_update(position.update):
            self.draw(f"{position.update:06d}")

    def after_epoch(self, position: Position) -> None:
        """Draw where the plan has an epoch."""
        if self.plan.is_due_after_epoch(position.epoch):
            self.draw(f"e{position.epoch:06d}")

    def after_training(self, position: Position) -> None:
        """Nothing is drawn at the end that an epoch or a step did not draw."""

    def draw(self, when: str) -> None:
        """Draw this process's share of the prompts and write the pictures."""
        before = next(self.vae.parameters()).device
        log.info("Drawing sample images")
        with self.averaged(), self.trainable.evaluation(), torch.no_grad():
            self.vae.to(self.pipeline.device)
            try:
                for index in range(self.process_index, len(self.requests), self.num_processes):
                    self._draw_one(index, when)
            finally:
                self.vae.to(before)

    def _draw_one(self, index: int, when: str) -> None:
        request = self.requests[index]
        encoded = None if self.encoded is None else [self.encoded[index]]
        picture = self.pipeline.draw([request], encoded=encoded)[0]
        path = self.folder / "sample" / sample_name(self.output_name, when, index, datetime.now(), request.seed)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as unfinished:
                picture.save(unfinished, format="PNG")
        except (OSError, UserError) as error:  # no reason to lose a training run
            log.error("The sample image %s could not be written (%s); training goes on.", path, error)
        self.show(index, picture, request.raw_prompt or request.prompt)
