"""Teach the toy a word by textual inversion, from eight pictures, and read from new pictures whether it was learned.

    python examples/toy/learn_word.py
    python examples/toy/learn_word.py --vectors 4 --output_dir outputs/word_of_4

The word stands for a yellow cross. The model itself is not trained: the word's vectors must find what it can draw already.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]

from drawing import PLACES, YELLOW_CROSS, Scene, draw, learned_caption, learned_scenes  # noqa: E402
from evaluate import CFG_SCALE, draw_captions  # noqa: E402
from reading import read_picture  # noqa: E402

from library.options.entry import run_script  # noqa: E402
from library.options.errors import UserError  # noqa: E402
from start import end_on_sigterm, run  # noqa: E402

CHECKPOINT = HERE / "toy_sdxl.safetensors"
GROUNDS = ("red", "green", "blue", "purple", "white", "black")
DATASET = """[general]
resolution = 128
caption_extension = ".txt"

[[datasets]]
batch_size = 4

[[datasets.subsets]]
image_dir = "{folder}"
"""


def main(argv: Sequence[str]) -> None:
    """Draw the pictures, train, draw with the word, and print how often it shows its meaning."""
    arguments = command_line().parse_args(argv)
    output = Path(arguments.output_dir)
    word = train(output, arguments.vectors, arguments.steps)
    crosses = [Scene("cross", "yellow", ground, "", place) for ground in GROUNDS for place in PLACES]
    captions = [learned_caption(cross) for cross in crosses]
    shares = {}
    for name, additions in (("with", ["--textual_inversion_embeddings", str(word)]), ("without", [])):
        read = [read_picture(picture) for picture in draw_captions(str(CHECKPOINT), additions, captions, 0, CFG_SCALE)]
        shares[name] = sum(each.colour == "yellow" and each.shape == "cross" for each in read) / len(read)
        if name == "with":
            grounds = sum(each.ground == cross.ground for each, cross in zip(read, crosses, strict=True)) / len(read)
    sys.stdout.write(
        f"{len(captions)} captions with the word {YELLOW_CROSS}: {shares['with']:.0%} show a yellow cross "
        f"({shares['without']:.0%} before), {grounds:.0%} on the ground of the caption\n"
    )


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1, help="vectors of the word (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="training steps (%(default)s)")
    parser.add_argument("--output_dir", default="outputs/word", help="folder for pictures and word (%(default)s)")
    return parser


def train(output: Path, vectors: int, steps: int) -> Path:
    """Draw the pictures, train the word on them, and return its file.

    Raises:
        UserError: the training failed.
    """
    pictures = output / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for number, (scene, caption) in enumerate(learned_scenes()):
        draw(scene, number).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(caption, encoding="utf-8")
    dataset = output / "dataset.toml"
    dataset.write_text(DATASET.format(folder=pictures.resolve().as_posix()), encoding="utf-8")
    command = [
        sys.executable, "sdxl_train_textual_inversion.py", "--pretrained_model_name_or_path", str(CHECKPOINT),
        "--dataset_config", str(dataset.resolve()), "--output_dir", str(output.resolve()), "--save_model_as", "safetensors",
        "--token_string", YELLOW_CROSS, "--num_vectors_per_token", str(vectors), "--optimizer_type", "AdamW",
        "--learning_rate", "2e-2", "--max_train_steps", str(steps), "--seed", "1", "--cache_latents",
        "--max_data_loader_n_workers", "0",
    ]  # fmt: skip
    if run(command) != 0:
        raise UserError("The training failed; what it said is above.")
    return output / f"{YELLOW_CROSS}.safetensors"


if __name__ == "__main__":
    end_on_sigterm()
    run_script(main)
