"""Draw captions the toy never saw in training, and read from the pixels whether the pictures show what was asked.

    python examples/toy/evaluate.py                                          # the shipped checkpoint
    python examples/toy/evaluate.py --ckpt other.safetensors --grid grid.png
    python examples/toy/evaluate.py --network_weights lora.safetensors       # and whether a new word was learned

`reading.py` states the rule by which pictures are read. Seeds are fixed: the same checkpoint gives the same figures.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]

from drawing import GROUNDS_OF_THE_STAR, PLACES, SIZE, Scene, unseen_scenes, word_caption  # noqa: E402
from reading import Reading, read_picture  # noqa: E402

from library.generation.request import ImageRequest  # noqa: E402
from library.options.entry import run_script  # noqa: E402
from library.options.errors import UserError  # noqa: E402
from library.options.parse import parse  # noqa: E402
from library.options.scripts import SdxlGenImgOptions  # noqa: E402

if TYPE_CHECKING:
    from PIL import Image

SAMPLER, STEPS, CFG_SCALE = "euler", 24, 4.0
_COLUMNS = 10


@dataclass(frozen=True)
class Score:
    """The shares of pictures that show what was asked, 0 to 1."""

    ground: float
    colour: float
    shape: float

    @classmethod
    def of(cls, readings: Sequence[Reading], scenes: Sequence[Scene]) -> "Score":
        """Compare pictures with the scenes they were asked to show."""
        fits = [reading.fits(scene) for reading, scene in zip(readings, scenes, strict=True)]
        return cls(*(sum(column) / len(fits) for column in zip(*fits, strict=True)))

    def __str__(self) -> str:
        """The three figures in percent."""
        return f"ground colour {self.ground:.0%}, object colour {self.colour:.0%}, shape {self.shape:.0%}"


def main(argv: Sequence[str]) -> None:
    """Draw, read, and print the figures."""
    arguments = command_line().parse_args(argv)

    scenes = unseen_scenes(arguments.number, arguments.seed)
    captions = [scene.caption for scene in scenes]
    pictures = draw_captions(arguments.ckpt, [], captions, arguments.seed, arguments.cfg_scale)
    score = Score.of([read_picture(picture) for picture in pictures], scenes)
    sys.stdout.write(f"{len(scenes)} captions never seen in training: {score}\n")
    figures: dict[str, object] = {"number": len(scenes), **vars(score)}
    if arguments.network_weights:
        figures |= evaluate_word(arguments.ckpt, arguments.network_weights, scenes, pictures, arguments.seed, arguments.cfg_scale)
    if arguments.grid:
        save_grid(pictures, arguments.grid)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=str(HERE / "toy_sdxl.safetensors"), help="the checkpoint (the shipped one)")
    parser.add_argument("--network_weights", help="a LoRA that teaches the new word; evaluates it beside the captions")
    parser.add_argument("--number", type=int, default=100, help="captions to draw (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of captions and of the pictures (0)")
    parser.add_argument("--cfg_scale", type=float, default=CFG_SCALE, help=f"guidance ({CFG_SCALE})")
    parser.add_argument("--grid", type=Path, help="write the pictures to this PNG")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def draw_captions(
    checkpoint: str, additions: Sequence[str], captions: Sequence[str], seed: int, cfg_scale: float
) -> list["Image.Image"]:
    """Draw one picture per caption with the suite's own pipeline, the n-th from the seed `seed + n`.

    Args:
        checkpoint: the model.
        additions: options of `sdxl_gen_img.py` that add networks, words or guide images.
        captions: one for each picture.
        seed: of the first picture.
        cfg_scale: guidance.

    Raises:
        UserError: there is no such checkpoint or network.
    """
    if not Path(checkpoint).exists():
        raise UserError(f"There is no checkpoint {checkpoint}. Make it with: python examples/toy/make.py")
    from library.generation.additions import guide_images, planned_controls, planned_words, with_guide_images
    from library.generation.network_files import planned_networks
    from sdxl_gen_img import attach, attach_controls, load_pipeline

    given = ["--ckpt", checkpoint, "--prompt", "unused", "--batch_size", "25"]
    options = parse(SdxlGenImgOptions, [*given, *additions])
    pipeline = load_pipeline(checkpoint, planned_words(options.network), options)
    attach(planned_networks(options.network), pipeline, options).set_strengths(None)
    controls = planned_controls(options.network)
    attach_controls(controls, pipeline, options)
    requests = [
        ImageRequest(prompt=caption, width=SIZE, height=SIZE, steps=STEPS, cfg_scale=cfg_scale, seed=seed + number, sampler=SAMPLER)
        for number, caption in enumerate(captions)
    ]
    requests = with_guide_images(requests, guide_images(options.network), len(controls))
    return [picture for start in range(0, len(requests), 25) for picture in pipeline.draw(requests[start : start + 25])]


def evaluate_word(
    checkpoint: str, network: str, scenes: Sequence[Scene], before: Sequence["Image.Image"], seed: int, cfg_scale: float
) -> dict[str, float]:
    """Tell how often the new word shows its concept with the network and without, and whether other captions stay as they were.

    Args:
        checkpoint: the base.
        network: the LoRA.
        scenes: of captions without the word.
        before: what the base draws of them.
        seed: of the pictures.
        cfg_scale: guidance.

    Returns:
        `word` and `word_without_network`: share of pictures of the word that show a striped star; `unchanged`: share of the other
        captions of which the network's picture reads as the base's does.
    """
    stars = [Scene("star", "striped", ground, "large", place) for ground in GROUNDS_OF_THE_STAR for place in PLACES] * 2
    captions = [word_caption(star) for star in stars]
    shares = {}
    lora = ["--network_module", "networks.lora", "--network_weights", network]
    for name, weights in (("word", lora), ("word_without_network", [])):
        read = [read_picture(picture) for picture in draw_captions(checkpoint, weights, captions, seed, cfg_scale)]
        shown = [reading.colour == "striped" and reading.shape == "star" for reading in read]
        shares[name] = sum(shown) / len(shown)
    after = draw_captions(checkpoint, lora, [scene.caption for scene in scenes], seed, cfg_scale)
    same = [read_picture(one) == read_picture(other) for one, other in zip(before, after, strict=True)]
    shares["unchanged"] = sum(same) / len(same)
    sys.stdout.write(
        f"{len(stars)} captions with the new word: {shares['word']:.0%} show it, "
        f"{shares['word_without_network']:.0%} without the LoRA\n"
        f"other captions that still show what they showed: {shares['unchanged']:.0%}\n"
    )
    return shares


def save_grid(pictures: Sequence["Image.Image"], path: Path) -> None:
    """Put pictures into one PNG, ten in a row."""
    from PIL import Image

    rows = -(-len(pictures) // _COLUMNS)
    grid = Image.new("RGB", (min(len(pictures), _COLUMNS) * SIZE, rows * SIZE))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % _COLUMNS * SIZE, number // _COLUMNS * SIZE))
    grid.save(path)


if __name__ == "__main__":
    run_script(main)
