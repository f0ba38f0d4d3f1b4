"""Sample images while training: what is drawn, by whom, and that training does not notice."""

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from library.generation.request import ImageRequest
from library.options.errors import UserError
from library.training.position import Position
from library.training.preview_plan import PreviewPlan
from library.training.previews import Drawn, EncodedTexts, Previews, PromptFile
from tests.training.fake_run import FakeRun, dataset

CAT, DOG = ImageRequest("a cat", "blurry", seed=3, raw_prompt="a cat --d 3"), ImageRequest("a dog", cfg_scale=1.0)
EVERY_STEP = PreviewPlan(at_first=True, every_n_epochs=None, every_n_steps=1)


class Pipeline:
    """Draws grey pictures, disturbing whatever a real one might."""

    device = torch.device("cpu")

    def __init__(self, look: Any = lambda: None) -> None:
        self.drawn: list[tuple[ImageRequest, Any]] = []
        self.look = look

    def draw(self, requests: Sequence[ImageRequest], *, encoded: Any = None) -> list[Image.Image]:
        self.look()
        torch.rand(3)
        self.drawn.append((requests[0], encoded))
        return [Image.new("RGB", (8, 8))]


def observer(folder: Path, run: FakeRun, pipeline: Pipeline, **changes: Any) -> Previews:
    prompts = PromptFile(folder / "prompts.txt", lambda: [CAT, DOG], [CAT, DOG])
    values: dict[str, Any] = {
        "plan": EVERY_STEP, "prompts": prompts, "pipeline": pipeline, "encoded": None, "vae": nn.Linear(1, 1),
        "trainable": run.trainable, "averaged": contextlib.nullcontext, "folder": folder, "output_name": "net",
        "process_index": 0, "num_processes": 1, "gather": list, "show": lambda position, drawn: None,
    }  # fmt: skip
    return Previews(**(values | changes))


def test_training_is_the_same_to_the_bit_and_dropout_is_off_in_pictures(tmp_path: Path) -> None:
    drawing, plain = FakeRun(dataset(4), updates=4), FakeRun(dataset(4), updates=4)
    modes: list[bool] = []
    pipeline = Pipeline(lambda: modes.append(drawing.network.training or drawing.network.dropout.training))
    drawing.run.observers = [observer(tmp_path, drawing, pipeline)]
    drawing.train()
    plain.train()
    assert len(pipeline.drawn) == 10 and not any(modes)
    assert drawing.network.training
    assert drawing.losses == plain.losses
    assert all(torch.equal(tensor, plain.weights()[name]) for name, tensor in drawing.weights().items())
    names = sorted(path.name for path in (tmp_path / "sample").iterdir())
    assert names[0].startswith("net_000001_00_") and names[1].startswith("net_000001_01_")
    assert names[0].endswith("_3.png") and [name for name in names if name.startswith("net_e000000_0")] == names[-2:]


def test_prompts_are_dealt_out_and_put_together_again(tmp_path: Path) -> None:
    run, shown = FakeRun(dataset(1), updates=1), []
    theirs = Drawn(0, tmp_path / "theirs.png", "a cat --d 3", 3)
    pipeline = Pipeline()
    second = observer(
        tmp_path, run, pipeline, process_index=1, num_processes=2,
        gather=lambda own: [*own, theirs], show=lambda position, drawn: shown.append((position, drawn)),
    )  # fmt: skip
    second.draw("e000001", Position(2, 0, 5))
    assert [request for request, _ in pipeline.drawn] == [DOG]
    ((position, (first, last)),) = shown
    assert (position.update, first, last.index, last.prompt, last.seed) == (5, theirs, 1, "a dog", None)
    assert last.path.is_file()


def test_who_edits_the_prompts_sees_it_in_the_next_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, answers = tmp_path / "prompts.txt", [[DOG], UserError("It is no text.")]
    path.write_text("a cat")

    def read() -> list[ImageRequest]:
        answer = answers.pop(0)
        if isinstance(answer, UserError):
            raise answer
        return answer

    prompts = PromptFile(path, read, [CAT])
    assert prompts.requests() == [CAT]
    path.write_text("a dog")
    os.utime(path, ns=(1, 1))
    assert [prompts.requests(), prompts.requests()] == [[DOG], [DOG]]
    path.write_text("torn")
    assert prompts.requests() == [DOG]
    assert "It is no text. The sample prompts read before are drawn." in caplog.text
    path.unlink()
    with pytest.raises(IndexError):  # read once more, and once only
        prompts.requests()


def test_texts_encoded_before_serve_other_sizes_and_new_texts_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = EncodedTexts([CAT, DOG], ["cat", "dog"])  # type: ignore[list-item]
    larger, new = ImageRequest("a cat", "blurry", width=64, seed=9), ImageRequest("a cat", "ugly")
    pipeline = Pipeline()
    prompts = PromptFile(tmp_path / "p.txt", list, [larger, new, ImageRequest("a dog", "ignored", cfg_scale=1.0)])
    observer(tmp_path, FakeRun(dataset(1), updates=1), pipeline, prompts=prompts, encoded=texts).draw("e000001", Position())
    assert [encoded for _, encoded in pipeline.drawn] == [["cat"], ["dog"]]
    assert '"a cat" is new in the sample prompts' in caplog.text


def test_a_picture_that_cannot_be_had_is_no_reason_to_lose_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    run, shown = FakeRun(dataset(1), updates=1), []

    def no_memory() -> None:
        if len(shown) == 0:
            raise torch.OutOfMemoryError("no memory")

    drawing = observer(tmp_path, run, Pipeline(no_memory), show=lambda position, drawn: shown.append(drawn))
    drawing.draw("e000001", Position())
    assert shown == [[]] and "no memory for a sample image of 1024 × 1024" in caplog.text
    (tmp_path / "sample").write_text("a file")
    drawing.draw("e000001", Position())
    assert shown == [[], []] and "could not be written" in caplog.text


def test_the_vae_goes_back_where_it_was(tmp_path: Path) -> None:
    places: list[Any] = []

    class Vae(nn.Linear):
        def to(self, device: Any) -> "Vae":
            places.append(device)
            return self

    observer(tmp_path, FakeRun(dataset(1), updates=1), Pipeline(), vae=Vae(1, 1, device="meta")).draw("e000001", Position())
    assert places == [torch.device("cpu"), torch.device("meta")]
