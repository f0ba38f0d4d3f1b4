"""Train a ControlNet-LLLite on outlines of the toy's pictures, and read whether new pictures put the shape where the outline is.

    python examples/toy/follow_outlines.py

The training pictures show shapes anywhere and of any size, which no caption tells; each has an outline. Then captions of
combinations that none of these pictures has are drawn along new outlines: the shape must fill them, in the caption's colours.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from drawing import COLOURS, SHAPES, SIZE, Scene, draw_inside, shape_mask  # noqa: E402
from evaluate import CFG_SCALE, Score, draw_captions  # noqa: E402
from PIL import Image  # noqa: E402
from reading import Mask, object_pixels, overlap, read_picture  # noqa: E402

from library.options.entry import run_script  # noqa: E402
from library.options.errors import UserError  # noqa: E402
from start import end_on_sigterm, run  # noqa: E402

CHECKPOINT = HERE / "toy_sdxl.safetensors"
TRAINED, DRAWN = 800, 50
"""Pictures that are trained on and captions that are drawn."""
STROKE = 6
"""Width of an outline in pixels, inwards from the shape's rim; a hair line would not tell on which of its sides the shape is."""
LARGEST, SMALLEST = 0.28, 0.16
"""Half the extent of a shape as a share of the picture's side."""
DATASET = """[general]
resolution = {size}
caption_extension = ".txt"

[[datasets]]
batch_size = 16

[[datasets.subsets]]
image_dir = "{pictures}"
conditioning_data_dir = "{outlines}"
"""


@dataclass(frozen=True)
class Placed:
    """A scene with its shape in a place of its own."""

    scene: Scene
    mask: Image.Image
    """Of `shape_mask`."""

    @property
    def inside(self) -> Mask:
        """1 inside the shape, (SIZE, SIZE)."""
        return (np.asarray(self.mask.resize((SIZE, SIZE), Image.Resampling.BOX)) > 127).astype(np.uint8)

    @property
    def outline(self) -> Image.Image:
        """The shape's edge, white on black; its outer rim is the shape's."""
        pen = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * STROKE + 1, 2 * STROKE + 1))
        hollow = cv2.erode(self.inside, pen, borderType=cv2.BORDER_CONSTANT, borderValue=0)
        return Image.fromarray((self.inside - hollow) * 255).convert("RGB")


def main(argv: Sequence[str]) -> None:
    """Draw the pictures, train, draw along new outlines, and print how well the shapes lie in them."""
    arguments = command_line().parse_args(argv)
    output = Path(arguments.output_dir)
    network = train(output, arguments.steps)
    placed = placed_scenes(DRAWN, seed=1, held_out=True)
    guides = output / "guides"
    write_outlines(guides, placed)
    captions = [each.scene.caption for each in placed]
    along = ["--control_net_lllite_models", str(network), "--guide_image_path", str(guides)]
    for name, additions in (("with the outline", along), ("without", [])):
        pictures = draw_captions(str(CHECKPOINT), additions, captions, 0, CFG_SCALE)
        sys.stdout.write(f"{DRAWN} captions, {name}: {figures(pictures, placed)}\n")


def figures(pictures: Sequence[Image.Image], placed: Sequence[Placed]) -> str:
    """Say how pictures agree with where the shapes should be, and with the colours of their captions."""
    overlaps = [overlap(object_pixels(picture), each.inside) for picture, each in zip(pictures, placed, strict=True)]
    score = Score.of([read_picture(picture) for picture in pictures], [each.scene for each in placed])
    return f"intersection over union with the outline's inside {np.mean(overlaps):.2f}; {score}"


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps (%(default)s)")
    parser.add_argument("--output_dir", default="outputs/outlines", help="folder for pictures and network (%(default)s)")
    return parser


def placed_scenes(number: int, seed: int, held_out: bool = False) -> list[Placed]:
    """Return scenes whose shapes lie anywhere and have any size, with captions that tell neither.

    Args:
        number: of scenes.
        seed: of the choice.
        held_out: whether their combinations of shape, colour and ground are those that are kept from training, or the others.
    """
    chance = random.Random(seed)
    scenes: list[Placed] = []
    while len(scenes) < number:
        colour, ground = chance.sample(tuple(COLOURS), 2)
        scene = Scene(chance.choice(SHAPES), colour, ground)
        if scene.is_held_out != held_out:
            continue
        radius = chance.uniform(SMALLEST, LARGEST)
        centre = (chance.uniform(radius, 1 - radius), chance.uniform(radius, 1 - radius))
        scenes.append(Placed(scene, shape_mask(scene.shape, centre, radius)))
    return scenes


def write_outlines(folder: Path, placed: Sequence[Placed]) -> None:
    """Write the outlines as numbered pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(placed):
        each.outline.save(folder / f"{number:04}.png")


def train(output: Path, steps: int) -> Path:
    """Draw pictures with outlines, train on them, and return the network's file.

    Raises:
        UserError: the training failed.
    """
    write_training_pictures(output)
    if run(training_command(output, steps)) != 0:
        raise UserError("The training failed; what it said is above.")
    return output / "outlines.safetensors"


def write_training_pictures(output: Path) -> None:
    """Write the pictures with captions, their outlines, and the dataset file."""
    pictures, outlines = output / "pictures", output / "outlines"
    pictures.mkdir(parents=True, exist_ok=True)
    placed = placed_scenes(TRAINED, seed=0)
    write_outlines(outlines, placed)
    for number, each in enumerate(placed):
        draw_inside(each.scene, each.mask).save(pictures / f"{number:04}.png")
        (pictures / f"{number:04}.txt").write_text(each.scene.caption, encoding="utf-8")
    dataset = output / "dataset.toml"
    folders = {"pictures": pictures.resolve().as_posix(), "outlines": outlines.resolve().as_posix()}
    dataset.write_text(DATASET.format(size=SIZE, **folders), encoding="utf-8")


def training_command(output: Path, steps: int) -> list[str]:
    """Return what trains on the pictures of a folder.

    Where a shape lies is decided while there is more noise than picture: those timesteps alone are trained, the noisiest with
    more weight.
    """
    return [
        sys.executable, "sdxl_train_control_net_lllite.py", "--pretrained_model_name_or_path", str(CHECKPOINT),
        "--dataset_config", str((output / "dataset.toml").resolve()), "--output_dir", str(output.resolve()),
        "--output_name", "outlines", "--cond_emb_dim", "64", "--network_dim", "128", "--optimizer_type", "AdamW",
        "--learning_rate", "3e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "20", "--min_timestep", "500",
        "--debiased_estimation_loss", "--max_train_steps", str(steps), "--seed", "1", "--cache_latents",
        "--cache_text_encoder_outputs", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip


if __name__ == "__main__":
    end_on_sigterm()
    run_script(main)
