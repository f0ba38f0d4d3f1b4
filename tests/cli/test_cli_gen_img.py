"""sdxl_gen_img.py as a person runs it: a process, files, words and exit statuses."""

import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from networks.control_net_lllite import ControlNetLLLite, Widths
from tests.cli.training_commands import ROOT, run_command

SMALL = ["--W", "64", "--H", "64", "--steps", "2", "--sampler", "euler_a"]


SCRIPT = str(ROOT / "sdxl_gen_img.py")


@pytest.fixture
def command(tiny_checkpoint: Path, tmp_path: Path) -> list[str]:
    return ["--ckpt", str(tiny_checkpoint), "--outdir", str(tmp_path / "out")]


def run(command: list[str], typed: str = "", prepare: Callable[[], object] | None = None) -> subprocess.CompletedProcess[str]:
    return run_command(command, script=SCRIPT, typed=typed, prepare=prepare)


def saved(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "out").glob("*"))


@pytest.fixture(scope="module")
def lora(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on one layer of the tiny model."""
    name = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    weight = load_file(tiny_checkpoint)[f"model.diffusion_model.{name}.weight"]
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    key = f"lora_unet_{name.replace('.', '_')}"
    save_file(
        {f"{key}.lora_down.weight": torch.ones(1, weight.shape[1]), f"{key}.lora_up.weight": torch.ones(weight.shape[0], 1)}, path
    )
    return path


def test_a_prompt_file_with_a_lora_and_then_typed_prompts(command, lora, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two sizes\na (red:1.3) cat --n dog --d 5 --x 1\na ferry --w 96 --h 70 --l 3 --s 1\n", encoding="utf-8")
    options = "--interactive --seed 3 --batch_size 2 --images_per_prompt 2 --bf16 --sequential_file_name"
    network = ["--network_module", "networks.lora", "--network_weights", str(lora), "--network_mul", "0.5"]
    typed = "\na dog --dsd1 3\na frog --d 9 --am 0.25\n"
    ran = run([*command, *SMALL, "--from_file", str(prompts), *options.split(), *network], typed)
    assert ran.returncode == 0, ran.stderr
    assert [path.name for path in saved(tmp_path)] == [f"im_{number:06d}.png" for number in range(1, 7)]
    pictures = [Image.open(path) for path in saved(tmp_path)]
    assert [picture.size for picture in pictures] == [(64, 64)] * 2 + [(96, 64)] * 2 + [(64, 64)] * 2
    assert [picture.text["seed"] for picture in pictures[:2]] == ["5", "5"]
    assert pictures[0].text["prompt"] == "a (red:1.3) cat"
    assert pictures[0].text["negative-prompt"] == "dog"
    assert pictures[2].text["steps"] == "1"
    assert 'Networks: "style: 0.5"' in pictures[0].text["parameters"]
    assert 'Networks: "style: 0.25"' in pictures[4].text["parameters"]
    assert np.array_equal(np.asarray(pictures[0]), np.asarray(pictures[1])), "equal seeds, equal pictures"
    assert not np.array_equal(np.asarray(pictures[2]), np.asarray(pictures[3]))
    assert f"{prompts}, line 2: --x is not an option of a prompt" in ran.stderr
    assert f"{prompts}, line 3: 96x70 is drawn as 96x64" in ran.stderr
    assert "prompt: --dsd1 (Deep Shrink) is not available" in ran.stderr
    assert "1 of 1 modules attached, strength 0.5" in ran.stderr


def test_a_learned_word_and_a_control_network_with_guide_images(command, tiny_checkpoint, tmp_path):
    family = SdxlFamily.open(ModelSource(str(tiny_checkpoint)))
    generator = torch.Generator().manual_seed(0)
    widths = family.sizes.te1.width, family.sizes.te2.width
    family.save_word(tmp_path / "newword.pt", [torch.randn(2, width, generator=generator) for width in widths], None, None)
    network = ControlNetLLLite(family.load_denoiser(torch.float32, torch.device("cpu")), Widths(8, 4))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    network.save_weights(str(tmp_path / "edges.safetensors"), torch.float16, None)
    for name, colour in (("black", 0), ("white", 255)):
        Image.new("L", (50, 50), colour).save(tmp_path / f"{name}.png")
    words = ["--textual_inversion_embeddings", str(tmp_path / "newword.pt")]
    control = ["--control_net_lllite_models", str(tmp_path / "edges.safetensors"), "--control_net_multipliers", "0.8"]
    guides = ["--guide_image_path", str(tmp_path / "black.png"), str(tmp_path / "white.png")]
    prompt = ["--prompt", "a newword --d 5", "--images_per_prompt", "3", "--sequential_file_name"]
    ran = run([*command, *SMALL, *words, *control, *guides, *prompt])
    assert ran.returncode == 0, ran.stderr
    assert "Words added: newword (2 vectors)" in ran.stderr
    first, second, third = (np.asarray(Image.open(path)) for path in saved(tmp_path))
    assert np.array_equal(first, third) and not np.array_equal(first, second), "the guide images take turns"


def test_every_mistake_is_told_together_before_anything_is_loaded(command, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog --dsd1 3\n", encoding="utf-8")
    command[1] = str(tmp_path / "nowhere.safetensors")
    started = time.perf_counter()
    ran = run(
        [*command, "--from_file", str(prompts), "--stepz", "3", "--network_module", "networks.lora", "--network_weights", "no.pt"]
    )
    assert ran.returncode == 2
    assert time.perf_counter() - started < 3
    for told in (
        "--stepz",
        f"{tmp_path}/nowhere.safetensors: there is no such file or folder",
        f"{prompts}, line 2: --dsd1 (Deep Shrink) is not available",
        "--network_weights no.pt: there is no such file",
    ):
        assert told in ran.stderr
    assert "Traceback" not in ran.stderr
    assert saved(tmp_path) == []


def test_a_lora_in_the_place_of_the_checkpoint_is_told(command, lora):
    command[1] = str(lora)
    ran = run([*command, *SMALL, "--prompt", "a"])
    assert ran.returncode == 1
    assert "style.safetensors" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_ctrl_c_keeps_the_finished_pictures(command, tmp_path):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *command, *SMALL, "--steps", "8", "--prompt", "a cat", "--images_per_prompt", "500"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while len(list((tmp_path / "out").glob("*.png"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert len(saved(tmp_path)) >= 2
    for path in saved(tmp_path):
        assert re.fullmatch(r"im_\d{14}_000_\d+(_\d+)?\.png", path.name)
        Image.open(path).load()


def test_a_disk_that_takes_no_more_is_a_sentence_and_leaves_no_part_of_a_file(command, tmp_path):
    ran = run([*command, *SMALL, "--prompt", "a"], prepare=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2000, 2000)))
    assert ran.returncode == 1
    assert "could not be written" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert saved(tmp_path) == []


def test_pictures_that_are_not_finite_are_told_at_the_end(command, tiny_checkpoint, tmp_path):
    tensors = load_file(tiny_checkpoint)
    tensors["model.diffusion_model.out.2.bias"][:] = float("nan")
    save_file(tensors, tmp_path / "broken.safetensors")
    command[1] = str(tmp_path / "broken.safetensors")
    ran = run([*command, *SMALL, "--prompt", "a cat", "--seed", "4"])
    assert ran.returncode == 1
    assert 'The picture of "a cat" (seed 4) is black' in ran.stderr
    assert "1 of the pictures came out black" in ran.stderr
    assert len(saved(tmp_path)) == 1
