"""The tool that writes random checkpoints."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from library.options.errors import UsageError
from tools.make_tiny_sdxl import main


def test_by_default_it_writes_the_tiny_sizes_in_half_precision(tmp_path, capsys) -> None:
    path = tmp_path / "tiny.safetensors"
    main([str(path)])
    tensors = load_file(path)
    assert "24,778,059 random weights" in capsys.readouterr().out
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert all(tensor.abs().max() > 0 for tensor in tensors.values()), "a zero weight would hide what depends on it"


def test_the_seed_decides_the_weights(tmp_path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    small = ["--vae_channels", "32", "--te_layers", "2,2"]
    for path, seed in zip(files, ("1", "1", "2"), strict=True):
        main([str(path), "--seed", seed, *small])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != files[2].read_bytes()


def test_other_sizes_are_read_back_from_the_file(tmp_path) -> None:
    path = tmp_path / "other.safetensors"
    options = "--model_channels 96 --channel_mult 1,2 --depth 1,1 --te_widths 96,64 --te_layers 2,4 --dtype bf16"
    main([str(path), *options.split()])
    sizes = SdxlFamily.open(ModelSource(str(path))).sizes
    assert (sizes.unet.model_channels, sizes.unet.context_dim, sizes.te1.width, sizes.te2.layers) == (96, 160, 96, 4)
    assert len(sizes.unet.input_blocks) == 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model_channels", "48"], r"--model_channels 48: 48 is too small; the least is 64\."),
        (["--model_channels", "100"], "multiples of 32"),
        (["--model_channels", "x"], "whole numbers are wanted"),
        (["--depth", "1,2"], "3 numbers are wanted, as many as --channel_mult has"),
        (["--depth", "0,0,0"], "would not see the text"),
        (["--te_widths", "64,64"], "tell the two text encoders apart by their widths"),
        (["--te_layers", "1,3"], "the least is 2"),
        (["--vae_channels", "40"], "multiples of 32"),
        (["--full", "--depth", "0,1,2"], "--depth does not go with --full"),
    ],
)
def test_a_size_that_cannot_be_used_is_one_sentence(tmp_path, options, sentence) -> None:
    with pytest.raises(UsageError, match=sentence):
        main([str(tmp_path / "x.safetensors"), *options])


def test_everything_wrong_is_told_at_once_with_status_2_and_without_torch(tmp_path, project_root) -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        "tools/make_tiny_sdxl.py",
        str(tmp_path / "no" / "x.ckpt"),
        "--te_layers",
        "0,3",
        "--vae_channels",
        "1",
    ]
    ran = subprocess.run(command, cwd=project_root, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    told = [line for line in ran.stderr.splitlines() if not line.startswith("import time:")]
    for mistake in ("must end in .safetensors", "--te_layers 0,3: 0 is too small", "--vae_channels 1: 1 is too small"):
        assert sum(mistake in line for line in told) == 1, told
    assert not any("Traceback" in line for line in told)
    assert not any(line.split("|")[-1].strip() == "torch" for line in ran.stderr.splitlines())
