"""`sdxl_train_control_net_lllite.py` as a person runs it: the network, its file, resuming, samples, and mistakes."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from networks.control_net_lllite import ControlNetLLLite, Widths, from_file, widths_of
from tests.cli.training_commands import (
    ROOT,
    assert_same_bits,
    run_command,
    weights,
    write_dataset,
    write_dataset_with_controls,
)

SCRIPT = str(ROOT / "sdxl_train_control_net_lllite.py")
SAME_RUN = ("--gradient_checkpointing", "--network_dropout", "0.2", "--ema_decay", "0.5", "--fp8_base")


def command(checkpoint: Path, dataset: Path, output: Path, *more: object) -> list[str]:
    """Return the arguments of a small run; later ones win over earlier ones."""
    return [
        "--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(dataset), "--output_dir", str(output),
        "--output_name", "lines", "--cond_emb_dim", "8", "--network_dim", "4", "--learning_rate", "1e-2", "--max_train_steps", "4",
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
    prompts = out / "prompts.txt"
    guide = next((dataset.parent / "controls").glob("*.png"))
    white = out / "white.png"
    Image.new("RGB", (64, 64), "white").save(white)
    lines = [f"a cat --w 64 --h 64 --s 1 --d 1 --cn {each}\n" for each in (guide, white)]
    prompts.write_text("".join(lines), encoding="utf-8")
    samples = ("--sample_prompts", prompts, "--sample_at_first", "--sample_every_n_steps", "4", "--validation_split", "0.4")
    more = ("--save_every_n_steps", "2", "--save_state", *samples, *SAME_RUN)
    done = run_command(command(tiny_checkpoint, dataset, out, *more), script=SCRIPT)
    assert done.returncode == 0, done.stderr
    return out, done.stderr


def test_the_network_is_saved_with_its_sizes_and_nothing_else_is_trained(
    whole_run: tuple[Path, str], tiny_checkpoint: Path
) -> None:
    out, said = whole_run
    names = ("lines", "lines-step00000002", "lines-step00000004")
    assert {path.stem for path in out.glob("lines*.safetensors")} == {*names, *(f"{name}-ema" for name in names)}
    learned = weights(out / "lines.safetensors")
    assert widths_of(learned, "lines") == Widths(8, 4)
    unet = SdxlFamily.open(ModelSource(str(tiny_checkpoint))).load_denoiser(torch.float32, torch.device("cpu"))
    assert {name: tensor.shape for name, tensor in learned.items()} == {
        name: tensor.shape for name, tensor in ControlNetLLLite(unet, Widths(8, 4)).state_dict().items()
    }
    ups = [tensor for name, tensor in learned.items() if name.endswith(".up.0.weight")]
    assert all(tensor.any() and tensor.dtype == torch.float32 for tensor in ups), "all modules learned, and began at zero"
    first = weights(out / "lines-step00000002.safetensors")
    seen = [name for name in learned if ".conditioning1." in name and not torch.equal(first[name], learned[name])]
    assert seen, "what sees the control images is trained too"
    with safe_open(out / "lines.safetensors", "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base/control-net-lllite"
        assert all(key.startswith("modelspec.") for key in file.metadata())
    assert set(weights(out / "lines-state" / "model.safetensors")) == set(learned), "the state holds the network alone"
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
    more = ("--resume", out / "lines-step00000002-state", "--validation_split", "0.4", "--blocks_to_swap", "12", *SAME_RUN)
    done = run_command(command(tiny_checkpoint, dataset, tmp_path, *more), script=SCRIPT)
    assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "lines.safetensors", out / "lines.safetensors")


def test_going_on_from_a_network_and_from_folders_without_a_file(
    whole_run: tuple[Path, str], tiny_checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    before = whole_run[0] / "lines.safetensors"
    folders = ("--train_data_dir", dataset.parent / "images", "--conditioning_data_dir", dataset.parent / "controls")
    words = command(tiny_checkpoint, dataset, tmp_path, *folders, "--resolution", "64", "--caption_extension", ".txt")
    del words[2:4]
    more = ("--network_weights", str(before), "--max_train_steps", "1", "--learning_rate", "1e-9")
    done = run_command([*words, *more], script=SCRIPT)
    assert done.returncode == 0, done.stderr
    again, old = weights(tmp_path / "lines.safetensors"), weights(before)
    assert all(torch.allclose(again[name], old[name], atol=1e-7) for name in old)
    unet = SdxlFamily.open(ModelSource(str(tiny_checkpoint))).load_denoiser(torch.float32, torch.device("cpu"))
    assert from_file(unet, str(tmp_path / "lines.safetensors")).widths == (8, 4)


def test_mistakes_are_told_in_sentences(
    whole_run: tuple[Path, str], tiny_checkpoint: Path, dataset: Path, photos: Path, tmp_path: Path
) -> None:
    plain = write_dataset(tmp_path / "plain", photos, count=1)
    changed = dataset.read_text(encoding="utf-8")
    cropped, missing, sized = (tmp_path / f"{name}.toml" for name in ("cropped", "missing", "sized"))
    cropped.write_text(f"{changed}random_crop = true\n", encoding="utf-8")
    empty, small = tmp_path / "empty", tmp_path / "small"
    controls = dataset.parent / "controls"
    for folder in (empty, small):
        folder.mkdir()
        for path in controls.glob("*.png"):
            Image.new("RGB", (32, 32)).save(folder / (path.name if folder is small else f"other{path.name}"))
    missing.write_text(changed.replace(controls.as_posix(), empty.as_posix()), encoding="utf-8")
    sized.write_text(changed.replace(controls.as_posix(), small.as_posix()), encoding="utf-8")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog --cn nowhere.png\n", encoding="utf-8")
    drawn = ("--sample_prompts", prompts, "--sample_at_first")
    cases: list[tuple[tuple[object, ...], int, list[str]]] = [
        (
            ("--cond_emb_dim", "7", "--network_dim", "0"),
            2,
            ["--cond_emb_dim is 7, but it must be even", "--network_dim is missing"],
        ),
        (("--network_weights", "nowhere.safetensors"), 2, ["there is no file nowhere.safetensors"]),
        (("--masked_loss",), 2, ["--masked_loss"]),
        (("--learning_rate", "0"), 2, ["--learning_rate is 0, so nothing is trained"]),
        (("--dataset_config", plain), 2, ["there are no control images for"]),
        (("--dataset_config", cropped), 2, ["random_crop of", "cannot be used with control images"]),
        (drawn, 2, ["line 1: there is no image that the picture is to follow", "there is no image nowhere.png (--cn)"]),
        (("--dataset_config", missing), 1, ["has no control or mask image"]),
        (("--dataset_config", sized), 1, ["is 32x32, but its image", "Make them equal"]),
        (
            ("--network_weights", whole_run[0] / "lines.safetensors", "--network_dim", "6"),
            1,
            ["The file has --cond_emb_dim 8 and --network_dim 4"],
        ),
    ]
    for more, status, told in cases:
        done = run_command(command(tiny_checkpoint, dataset, tmp_path / "no", *more), script=SCRIPT)
        assert (done.returncode, [each for each in told if each not in done.stderr]) == (status, []), (more, done.stderr)
        assert "Traceback" not in done.stderr
