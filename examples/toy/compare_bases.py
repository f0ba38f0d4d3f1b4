"""Teach the toy its word beside a base in bfloat16 and beside a quantised one, and tell whether the second draws it as often.

    python examples/toy/compare_bases.py --json benchmarks/results/toy_nf4.json
    python examples/toy/compare_bases.py --base_quant int8 --seeds 42 --number 36

Each seed trains both; both draw the same captions from the same noise, with the whole model. A LoRA that `--output_dir` has is not
trained again.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]

from drawing import GROUNDS_OF_THE_STAR, PLACES, Scene, word_caption  # noqa: E402
from evaluate import CFG_SCALE, draw_captions  # noqa: E402
from reading import read_picture  # noqa: E402

from library.options.entry import run_script  # noqa: E402
from library.options.errors import UserError  # noqa: E402
from start import end_on_sigterm, run  # noqa: E402

Shown = dict[int, list[bool]]
"""Whether each picture shows the word, by training seed; the n-th pictures are of one caption and one noise."""

CHECKPOINT = HERE / "toy_sdxl.safetensors"
FIRST_SEED = 1000
"""Of the noise of the pictures."""


def main(argv: Sequence[str]) -> None:
    """Train, draw, and print the shares of pictures that show the word."""
    arguments = command_line().parse_args(argv)
    bases: dict[str, list[str]] = {"bf16": [], arguments.base_quant: ["--base_quant", arguments.base_quant]}
    shown: dict[str, Shown] = {name: {} for name in bases}
    for seed in arguments.seeds:
        for name, options in bases.items():
            lora = train(arguments.output_dir, name, options, seed, arguments.steps)
            shown[name][seed] = shows_word(lora, arguments.number)
        figures = compared(shown)
        sys.stdout.write(f"after seed {seed}: {json.dumps(figures)}\n")
        sys.stdout.flush()
        if arguments.json:
            facts = {"command": " ".join(["python examples/toy/compare_bases.py", *argv]), "steps": arguments.steps}
            arguments.json.write_text(json.dumps({**facts, **figures}, indent=2) + "\n", encoding="utf-8")


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_quant", default="nf4", help="of the second base, as in training (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="of the trainings (42 43 44)")
    parser.add_argument("--steps", type=int, default=400, help="training steps (%(default)s)")
    parser.add_argument("--number", type=int, default=180, help="pictures of each LoRA (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bases"), help="folder for the LoRAs (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, after each seed")
    return parser


def train(output: Path, name: str, options: Sequence[str], seed: int, steps: int) -> Path:
    """Train a LoRA with the settings of the demo in bfloat16, unless it is there, and return its file.

    Raises:
        UserError: the training failed.
    """
    lora = output.resolve() / f"{name}_{steps}_{seed}.safetensors"
    command = [
        sys.executable, "sdxl_train_network.py", "--config_file", "examples/toy/training.toml",
        "--pretrained_model_name_or_path", str(CHECKPOINT), "--output_dir", str(lora.parent), "--output_name", lora.stem,
        "--mixed_precision", "bf16", "--seed", str(seed), "--max_train_steps", str(steps), *options,
    ]  # fmt: skip
    if not lora.exists() and run(command) != 0:
        raise UserError("The training failed; what it said is above.")
    return lora


def shows_word(lora: Path, number: int) -> list[bool]:
    """Draw captions with the word, and tell of each picture whether it shows the striped star."""
    stars = [Scene("star", "striped", ground, "large", place) for ground in GROUNDS_OF_THE_STAR for place in PLACES]
    captions = [word_caption(star) for star in islice(cycle(stars), number)]
    network = ["--bf16", "--no_half_vae", "--network_module", "networks.lora", "--network_weights", str(lora)]
    read = [read_picture(picture) for picture in draw_captions(str(CHECKPOINT), network, captions, FIRST_SEED, CFG_SCALE)]
    return [reading.colour == "striped" and reading.shape == "star" for reading in read]


def compared(shown: dict[str, Shown]) -> dict[str, object]:
    """Return the shares of two bases, and the difference of the second to the first in points (percent).

    Besides, the standard error of the difference: of pictures, each taken with the other base's from the same noise; and of
    trainings, where there are several.

    Args:
        shown: of both bases, by name.
    """
    first, second = shown.values()
    by_seed = {seed: [100 * (there - here) for here, there in zip(first[seed], second[seed], strict=True)] for seed in first}
    differences = [difference for values in by_seed.values() for difference in values]
    means = [statistics.fmean(values) for values in by_seed.values()]
    shares = {name: {str(seed): statistics.fmean(each) for seed, each in base.items()} for name, base in shown.items()}
    errors = {"of pictures": _standard_error(differences)}
    if len(means) > 1:
        errors["of trainings"] = _standard_error(means)
    return {
        "pictures of each base": len(differences),
        "share that shows the word, by seed": shares,
        "share that shows the word": {name: statistics.fmean(each.values()) for name, each in shares.items()},
        "difference in points": statistics.fmean(differences),
        "its standard error": errors,
    }


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


if __name__ == "__main__":
    end_on_sigterm()
    run_script(main)
