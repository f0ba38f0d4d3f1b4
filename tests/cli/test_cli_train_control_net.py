"""`sdxl_train_control_net.py` as a person runs it: the network, its file, resuming, samples, and mistakes."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from library.options.errors import UsageError
from library.options.parse import parse
from library.options.scripts import SdxlTrainControlNetOptions
from tests.cli.training_commands import ROOT, assert_same_bits, run_command, weights, write_dataset_with_controls

SCRIPT = str(ROOT / "sdxl_train_control_net.py")
SAME_RUN = ("--gradient_checkpointing", "--ema_decay", "0.5", "--fp8_base", "--validation_split", "0.4")
NEW = "controlnet_"


def command(checkpoint: Path, dataset: Path, output: Path, *more: object) -> list[str]:
    """Return the arguments of a small run; later ones win over earlier ones."""
    return [
        "--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(dataset), "--output_dir", str(output),
        "--output_name", "lines", "--learning_rate", "1e-3", "--control_net_lr", "1e-2", "--max_train_steps", "4",
        "--seed", "11", "--max_data_loader_n_workers", "0", "--cache_latents", "--cache_text_encoder_outputs", *map(str, more),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A dataset file with control images beside the pictures."""
    return write_dataset_with_controls(tmp_path_factory.mktemp("data"), photos)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, dataset: Path) -> tuple[Path, str]:
    """The output folder, and what was said, of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("out")
    prompts, white = out / "prompts.txt", out / "white.png"
    Image.new("RGB", (64, 64), "white").save(white)
    guides = (next((dataset.parent / "controls").glob("*.png")), white)
    prompts.write_text("".join(f"a cat --w 64 --h 64 --s 1 --d 1 --cn {each}\n" for each in guides), encoding="utf-8")
    samples = ("--sample_prompts", prompts, "--sample_at_first", "--sample_every_n_steps", "4")
    more = ("--save_every_n_steps", "2", "--save_state", *samples, *SAME_RUN)
    done = run_command(command(tiny_checkpoint, dataset, out, *more), script=SCRIPT)
    assert done.returncode == 0, done.stderr
    return out, done.stderr


def test_all_of_the_network_learns_and_is_saved_in_the_names_of_diffusers(
    whole_run: tuple[Path, str], tiny_checkpoint: Path
) -> None:
    out, said = whole_run
    names = ("lines", "lines-step00000002", "lines-step00000004")
    assert {path.stem for path in out.glob("lines*.safetensors")} == {*names, *(f"{name}-ema" for name in names)}
    learned = weights(out / "lines.safetensors")
    untrained = SdxlFamily.open(ModelSource(str(tiny_checkpoint))).make_control_net(None, torch.float32, torch.device("cpu"))
    began = {untrained.names[name]: tensor for name, tensor in untrained.state_dict().items()}
    assert {"conv_in.weight", "mid_block.resnets.0.conv1.weight", f"{NEW}cond_embedding.blocks.5.bias"} <= learned.keys()
    assert {name: tensor.shape for name, tensor in learned.items()} == {name: tensor.shape for name, tensor in began.items()}
    assert all(tensor.dtype == torch.float32 for tensor in learned.values())
    still = [name for name in learned if torch.equal(learned[name], began[name])]
    assert still == [], "the copied blocks learn, and the new parts"
    with safe_open(out / "lines.safetensors", "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base/controlnet"
        assert all(key.startswith("modelspec.") for key in file.metadata())
    assert len(weights(out / "lines-state" / "model.safetensors")) == len(learned), "the state holds the network alone"
    assert "Validation loss" in said


def test_sample_images_follow_their_guide_images_once_something_is_learned(whole_run: tuple[Path, str]) -> None:
    out, _ = whole_run
    pictures = [path.read_bytes() for path in sorted((out / "sample").glob("*.png"))]
    by_steps, at_first = pictures[:2], pictures[2:]
    assert len(pictures) == 4
    assert at_first[0] == at_first[1], "an untrained network changes nothing"
    assert by_steps[0] != by_steps[1]


def test_a_resumed_run_ends_at_the_same_bits(
    whole_run: tuple[Path, str], tiny_checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    out, _ = whole_run
    more = ("--resume", out / "lines-step00000002-state", *SAME_RUN)
    done = run_command(command(tiny_checkpoint, dataset, tmp_path, *more), script=SCRIPT)
    assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "lines.safetensors", out / "lines.safetensors")


def test_going_on_from_a_file_with_the_copied_blocks_frozen(
    whole_run: tuple[Path, str], tiny_checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    before = whole_run[0] / "lines.safetensors"
    more = ("--controlnet_model_name_or_path", before, "--learning_rate", "0", "--max_train_steps", "1")
    done = run_command(command(tiny_checkpoint, dataset, tmp_path, *more), script=SCRIPT)
    assert done.returncode == 0, done.stderr
    again, old = weights(tmp_path / "lines.safetensors"), weights(before)
    moved = {name for name in old if not torch.equal(again[name], old[name])}
    assert moved == {name for name in old if name.startswith(NEW)}
    steps = torch.cat([(again[name] - old[name]).abs().flatten() for name in moved])
    assert steps.median() == pytest.approx(1e-2, rel=0.05), "the first step of AdamW is as long as --control_net_lr"


def test_mistakes_are_told_in_sentences(tiny_checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    given = "--controlnet_model_name_or_path"
    cases: list[tuple[tuple[object, ...], str]] = [
        ((given, "nowhere.safetensors"), "there is no file nowhere.safetensors. Give the .safetensors file of a ControlNet"),
        (("--control_net_lr", "0"), "--control_net_lr 0 keeps at zero what joins"),
        ((given, tiny_checkpoint, "--control_net_lr", "0", "--learning_rate", "0"), "so nothing is trained"),
        (("--control_net_lr", "-1"), "negative"),
        (("--masked_loss",), "--masked_loss"),
        (("--cond_emb_dim", "32"), "--cond_emb_dim"),
    ]
    for more, told in cases:
        with pytest.raises(UsageError, match=told):
            parse(SdxlTrainControlNetOptions, command(tiny_checkpoint, dataset, tmp_path, *more))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n", encoding="utf-8")
    unguided = ("--sample_prompts", prompts, "--sample_at_first")
    for arguments, status, told in (
        (unguided, 2, "line 1: there is no image that the picture is to follow"),
        ((given, tiny_checkpoint), 1, f"{tiny_checkpoint} is no ControlNet in diffusers' layout"),
    ):
        done = run_command(command(tiny_checkpoint, dataset, tmp_path / "no", *arguments), script=SCRIPT)
        assert done.returncode == status and told in done.stderr and "Traceback" not in done.stderr, done.stderr
