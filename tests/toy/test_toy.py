"""The toy: its pictures are read right, its checkpoint draws what it says, and its recipe runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "examples" / "toy"
sys.path.insert(0, str(TOY))

from drawing import COLOURS, SHAPES, Scene, all_scenes, draw, star_scenes, training_scenes, unseen_scenes  # noqa: E402
from reading import read_picture  # noqa: E402


def run(*command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_captions_tell_scenes_apart_and_evaluation_captions_are_never_trained_on() -> None:
    captions = {scene.caption for scene in all_scenes()}
    assert len(captions) == len(all_scenes()) == 5 * 8 * 7 * 3 * 3
    assert Scene("star", "red", "blue", "small", "left").caption == "a small red star on the left of a blue ground"
    trained = training_scenes(5000, seed=0)
    unseen = unseen_scenes(100, seed=0)
    kinds = {(scene.shape, scene.colour, scene.ground) for scene in trained}
    assert not kinds & {(scene.shape, scene.colour, scene.ground) for scene in unseen}
    assert {scene.shape for scene in unseen} == set(SHAPES) and {scene.ground for scene in unseen} == set(COLOURS)


def test_true_drawings_are_read_right_in_at_least_99_percent() -> None:
    scenes = all_scenes()[::4]
    right = [read_picture(draw(scene, seed=number)).fits(scene) for number, scene in enumerate(scenes)]
    for column in zip(*right, strict=True):
        assert sum(column) >= 0.99 * len(scenes)


def test_a_picture_without_an_object_or_with_another_one_is_read_as_that() -> None:
    empty = Image.new("RGB", (128, 128), COLOURS["green"])
    assert read_picture(empty).ground == "green" and not read_picture(empty).shape
    star = read_picture(draw(Scene("star", "striped", "yellow", "large"), seed=1))
    assert (star.ground, star.colour, star.shape) == ("yellow", "striped", "star")
    assert read_picture(draw(Scene("circle", "red", "blue"))).fits(Scene("star", "red", "blue")) == (True, True, False)


def test_the_pictures_of_the_new_word_are_those_the_recipe_draws() -> None:
    drawn = [(draw(scene, seed=100_000 + number), caption) for number, (scene, caption) in enumerate(star_scenes())]
    files = sorted((TOY / "concept").glob("*.png"))
    assert len(files) == len(drawn) == 12
    for path, (picture, caption) in zip(files, drawn, strict=True):
        assert path.with_suffix(".txt").read_text().strip() == caption
        assert "zibbly" in caption and "star" not in caption
        assert read_picture(Image.open(path)) == read_picture(picture)


def test_the_shipped_checkpoint_draws_captions_it_never_saw(tmp_path: Path) -> None:
    assert (TOY / "toy_sdxl.safetensors").stat().st_size <= 30_000_000
    said = run("examples/toy/evaluate.py", "--number", 16, "--json", tmp_path / "figures.json", "--grid", tmp_path / "grid.png")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ground"] >= 0.85 and figures["colour"] >= 0.8 and figures["shape"] >= 0.7, said
    assert Image.open(tmp_path / "grid.png").size == (1280, 256)


def test_the_recipe_runs_from_pictures_to_an_evaluated_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "toy.safetensors"
    small = ("--pictures", 8, "--vae_steps", 2, "--steps", 2, "--batch_size", 4, "--mixed_precision", "no")
    run("examples/toy/make.py", "--work", tmp_path / "work", "--out", out, *small, "--evaluate", 2)
    assert out.stat().st_size <= 30_000_000
    assert (tmp_path / "work" / "samples.png").exists() and (tmp_path / "work" / "figures.json").exists()
    again = run("examples/toy/make.py", "--work", tmp_path / "work", "--out", out, *small, "--evaluate", 2)
    assert "sdxl_train.py" not in again and "train_vae.py" not in again


def test_a_missing_checkpoint_is_told_in_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "examples/toy/evaluate.py", "--ckpt", str(tmp_path / "missing.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "There is no checkpoint" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_fills_its_box(shape: str) -> None:
    picture = draw(Scene(shape, "white", "black", "large")).convert("L").point(lambda level: 255 * (level > 127))
    left, top, right, bottom = picture.getbbox()
    assert 60 < right - left < 90 and 60 < bottom - top < 90


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("script", "words"), [("make", ("--pictures", "1", "--work")), ("learn_word", ("--output_dir",))])
def test_a_demonstration_that_is_ended_ends_the_training_it_started(script: str, words: tuple[str, ...], tmp_path: Path) -> None:
    marker = tmp_path / "child.pid"
    child = [sys.executable, "-c", f"import os, time; open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(60)"]
    driver = (
        f"import runpy, start, sys\nsys.argv = {[script, *words, str(tmp_path)]!r}\n"
        f"run = start.run\nstart.run = lambda _: run({child!r})\n"
        f"runpy.run_path({str(TOY / f'{script}.py')!r}, run_name='__main__')"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (marker.exists() and marker.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)
