"""Sample images while training, so that a person sees what the model has learned."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import nn

from library.files.atomic import atomic_write
from library.generation.pipeline import EncodedPrompt, Pipeline
from library.generation.request import ImageRequest
from library.options.errors import UserError
from library.training.position import Position
from library.training.preparation import free_memory
from library.training.preview_plan import PreviewPlan, sample_name
from library.training.trainable import Trainable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """A sample image on disk."""

    index: int
    """Position in the prompt file."""
    path: Path
    prompt: str
    """The line as typed."""
    seed: int | None


class PromptFile:
    """The sample prompts as the file says at the time of drawing: who edits it sees the change in the next pictures.

    A file that has become unreadable or wrong is told of, and the prompts read before are drawn.

    Args:
        path: of the file.
        read: reads it.
        requests: what it said when the run began.
    """

    def __init__(self, path: Path, read: Callable[[], Sequence[ImageRequest]], requests: Sequence[ImageRequest]) -> None:
        self._path = path
        self._read = read
        self._requests = requests
        self._stamp = self._stamp_now()

    def requests(self) -> Sequence[ImageRequest]:
        """Return the prompts; the file is read where it changed."""
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return self._requests
        self._stamp = stamp
        try:
            self._requests = self._read()
        except UserError as error:
            log.error("%s The sample prompts read before are drawn.", error)
        return self._requests

    def _stamp_now(self) -> tuple[int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size


class EncodedTexts:
    """The text of sample prompts, encoded before the text encoders were freed.

    Args:
        requests: as they were then.
        encoded: their text.
    """

    def __init__(self, requests: Sequence[ImageRequest], encoded: Sequence[EncodedPrompt]) -> None:
        self._encoded = {_text(request): each for request, each in zip(requests, encoded, strict=True)}

    def of(self, request: ImageRequest) -> EncodedPrompt | None:
        """Return the text of a request, or None where it was not encoded."""
        return self._encoded.get(_text(request))


@dataclass
class Previews:
    """The observer that draws. Prompts are dealt out to the processes in turn.

    Args:
        plan: when.
        prompts: what.
        pipeline: draws with the models being trained.
        encoded: the prompts' text where the text encoders do not change; None: encoded anew each time.
        vae: moved to the device for drawing and back to where it was.
        trainable: put in evaluation mode while drawing.
        averaged: enters the evaluation mode of optimizers that train other weights than they want looked at.
        folder: the output folder; pictures go to its `sample` folder.
        output_name: first part of the file names, or None.
        process_index, num_processes: which of the prompts are drawn here.
        gather: gives every process what each hands in (`accelerate.utils.gather_object`).
        show: receives what all processes drew, in the order of the prompt file.
    """

    plan: PreviewPlan
    prompts: PromptFile
    pipeline: Pipeline
    encoded: EncodedTexts | None
    vae: nn.Module
    trainable: Trainable
    averaged: Callable[[], AbstractContextManager[None]]
    folder: Path
    output_name: str | None
    process_index: int
    num_processes: int
    gather: Callable[[list[Drawn]], list[Drawn]]
    show: Callable[[Position, Sequence[Drawn]], None]

    def before_training(self, position: Position) -> None:
        """Draw before the first step where that was asked for; a resumed run has drawn already."""
        if self.plan.at_first and position.update == 0:
            self.draw(f"e{0:06d}", position)

    def after_update(self, position: Position) -> None:
        """Draw where the plan has a step."""
        if self.plan.is_due_after_update(position.update):
            self.draw(f"{position.update:06d}", position)

    def after_epoch(self, position: Position) -> None:
        """Draw where the plan has an epoch."""
        if self.plan.is_due_after_epoch(position.epoch):
            self.draw(f"e{position.epoch:06d}", position)

    def after_training(self, position: Position) -> None:
        """Nothing is drawn at the end that an epoch or a step did not draw."""

    def draw(self, when: str, position: Position) -> None:
        """Draw this process's share of the prompts and write the pictures."""
        before = next(self.vae.parameters()).device
        log.info("Drawing sample images")
        requests = self.prompts.requests()
        drawn: list[Drawn] = []
        with self.averaged(), self.trainable.evaluation(), torch.no_grad():
            self.vae.to(self.pipeline.device)
            try:
                for index in range(self.process_index, len(requests), self.num_processes):
                    drawn += self._drawn(index, requests[index], when)
            finally:
                self.vae.to(before)
        if self.pipeline.device.type == "cuda":
            free_memory()
        self.show(position, sorted(self.gather(drawn), key=lambda each: each.index))

    def _drawn(self, index: int, request: ImageRequest, when: str) -> list[Drawn]:
        """Draw one prompt; nothing that goes wrong with a picture is a reason to lose a training run."""
        encoded = None
        if self.encoded is not None:
            found = self.encoded.of(request)
            if found is None:
                log.warning('"%s" is new in the sample prompts; the text encoders are gone, so it is not drawn.', request.prompt)
                return []
            encoded = [found]
        path = self.folder / "sample" / sample_name(self.output_name, when, index, datetime.now(), request.seed)
        try:
            picture = self.pipeline.draw([request], encoded=encoded)[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as unfinished:
                picture.save(unfinished, format="PNG")
        except (OSError, UserError) as error:
            log.error("The sample image %s could not be written (%s); training goes on.", path, error)
            return []
        except torch.OutOfMemoryError:
            free_memory()
            log.error(
                "There is no memory for a sample image of %d × %d; training goes on. Give it a smaller --w and --h.",
                request.width,
                request.height,
            )
            return []
        return [Drawn(index, path, request.raw_prompt or request.prompt, request.seed)]


def _text(request: ImageRequest) -> tuple[str, str | None]:
    return request.prompt, request.negative_prompt if request.uses_guidance else None
