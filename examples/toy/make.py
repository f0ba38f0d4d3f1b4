"""Make the toy's checkpoint from nothing: pictures, VAE, text encoders and U-Net, all with fixed seeds.

    python examples/toy/make.py                               # about an hour and a half on two cores, minutes on a GPU
    python examples/toy/make.py --work toy_work --steps 20 --vae_steps 20 --pictures 40     # only to see that it runs

Everything is kept in the work folder; what is there already is not made again, and an interrupted training goes on from its last
state. The finished checkpoint is evaluated on captions it has never seen.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]

from drawing import Scene, draw, star_scenes, training_scenes  # noqa: E402

from library.options.entry import run_script  # noqa: E402
from start import end_on_sigterm, run  # noqa: E402

DATASET = """\
[general]
resolution = 128
caption_extension = ".txt"

[[datasets]]
batch_size = {batch_size}

[[datasets.subsets]]
image_dir = "{images}"
num_repeats = 1
"""
TRAINING = """\
train_text_encoder = true
learning_rate = 1e-3
learning_rate_te1 = 5e-4
learning_rate_te2 = 5e-4
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.0", "betas=0.9,0.99"]
lr_scheduler = "cosine"
lr_warmup_steps = 100
caption_dropout_rate = 0.1
cache_latents = true
vae_batch_size = 32
no_half_vae = true
max_data_loader_n_workers = 0
save_precision = "fp16"
save_every_n_steps = {save_every}
save_last_n_steps_state = {save_every}
save_state = true
seed = 3
"""


def main(argv: Sequence[str]) -> None:
    """Make what is not there yet, step by step."""
    arguments = command_line().parse_args(argv)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    scenes = training_scenes(arguments.pictures, seed=0)
    draw_pictures(work / "images", [(scene, scene.caption) for scene in scenes], first_seed=0)
    draw_pictures(HERE / "concept", star_scenes(), first_seed=100_000)
    if not (work / "vae.safetensors").exists():
        run_step("examples/toy/train_vae.py", work / "vae.safetensors", "--steps", arguments.vae_steps)
    if not (work / "initial.safetensors").exists():
        run_step("examples/toy/make_initial.py", work / "vae.safetensors", work / "initial.safetensors")
    train(work, arguments.steps, arguments.batch_size, arguments.mixed_precision)
    shutil.copyfile(work / "toy_sdxl.safetensors", arguments.out)
    judge = ("--number", arguments.evaluate, "--grid", work / "samples.png", "--json", work / "figures.json")
    run_step("examples/toy/evaluate.py", "--ckpt", arguments.out, *judge)


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("toy_work"), help="folder for everything made on the way (toy_work)")
    parser.add_argument("--out", type=Path, default=HERE / "toy_sdxl.safetensors", help="the finished checkpoint (the shipped one)")
    parser.add_argument("--pictures", type=int, default=6400, help="pictures to train on (6400)")
    parser.add_argument("--vae_steps", type=int, default=3000, help="steps of the VAE (3000)")
    parser.add_argument("--steps", type=int, default=7000, help="steps of text encoders and U-Net (7000)")
    parser.add_argument("--batch_size", type=int, default=32, help="pictures per step (32)")
    parser.add_argument("--mixed_precision", default="bf16", choices=("no", "bf16"), help="of the training (bf16)")
    parser.add_argument("--evaluate", type=int, default=100, help="captions the finished checkpoint is judged by (100)")
    return parser


def draw_pictures(folder: Path, pictures: Sequence[tuple[Scene, str]], first_seed: int) -> None:
    """Draw pictures that are not there yet, with their captions beside them.

    Args:
        folder: made when needed.
        pictures: scenes and captions.
        first_seed: of the first picture's small differences; the n-th has `first_seed + n`.
    """
    folder.mkdir(exist_ok=True)
    for number, (scene, caption) in enumerate(pictures):
        path = folder / f"{number:05d}.png"
        if not path.exists():
            path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
            draw(scene, seed=first_seed + number).save(path)


def train(work: Path, steps: int, batch_size: int, mixed_precision: str) -> None:
    """Train text encoders and U-Net with the suite's own script, from the newest saved state if there is one."""
    if (work / "toy_sdxl.safetensors").exists():
        return
    (work / "dataset.toml").write_text(DATASET.format(images=(work / "images").as_posix(), batch_size=batch_size), encoding="utf-8")
    (work / "training.toml").write_text(TRAINING.format(save_every=max(1, steps // 10)), encoding="utf-8")
    states = sorted(work.glob("toy_sdxl-step*-state"))
    run_step(
        "sdxl_train.py",
        *("--config_file", work / "training.toml", "--dataset_config", work / "dataset.toml"),
        *("--pretrained_model_name_or_path", work / "initial.safetensors"),
        *("--output_dir", work, "--output_name", "toy_sdxl"),
        *("--max_train_steps", steps, "--mixed_precision", mixed_precision),
        *(("--resume", states[-1]) if states else ()),
    )


def run_step(script: str, *arguments: object) -> None:
    """Run a script of the suite, and end with its status where it fails."""
    command = [sys.executable, script, *map(str, arguments)]
    sys.stdout.write(f"\n$ {' '.join(['python', *command[1:]])}\n")
    sys.stdout.flush()
    status = run(command)
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    end_on_sigterm()
    run_script(main)
