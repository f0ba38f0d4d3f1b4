"""The two scripts that train control networks, as a person runs them: the network, its file, resuming, samples, and mistakes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import sdxl_train_control_net_lllite
from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from library.options.errors import UsageError
from library.options.parse import parse
from library.options.scripts import SdxlTrainControlNetOptions
from networks.control_net_lllite import ControlNetLLLite, Widths, from_file, widths_of
from tests.cli.training_commands import (
    ROOT,
    assert_same_bits,
    run_command,
    weights,
    write_dataset,
    write_dataset_with_controls,
)

NEW = "controlnet_"
"""How the names of what the U-Net does not have begin, in a ControlNet's file."""


@dataclass(frozen=True)
class Script:
    """One of the two scripts."""

    script: str
    own: tuple[str, ...]
    """What a small run gives it that the other does not take so."""
    same_run: tuple[str, ...]
    """What a resumed run is given again."""
    architecture: str
    """In the metadata of what it saves."""

    def arguments(self, checkpoint: Path, dataset: Path, output: Path, *more: object) -> list[str]:
        """Return the arguments of a small run; later ones win over earlier ones."""
        return [
            "--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(dataset), "--output_dir", str(output),
            "--output_name", "lines", "--max_train_steps", "4", "--seed", "11", "--max_data_loader_n_workers", "0",
            "--cache_latents", "--cache_text_encoder_outputs", *self.own, *map(str, more),
        ]  # fmt: skip


SAME_RUN = ("--gradient_checkpointing", "--ema_decay", "0.5", "--fp8_base", "--validation_split", "0.4")
CONTROL_NET = Script(
    str(ROOT / "sdxl_train_control_net.py"),
    ("--learning_rate", "1e-3", "--control_net_lr", "1e-2"),
    SAME_RUN,
    "stable-diffusion-xl-v1-base/controlnet",
)
LLLITE = Script(
    str(ROOT / "sdxl_train_control_net_lllite.py"),
    ("--learning_rate", "1e-2", "--cond_emb_dim", "8", "--network_dim", "4"),
    (*SAME_RUN, "--network_dropout", "0.2"),
    "stable-diffusion-xl-v1-base/control-net-lllite",
)
both_scripts = pytest.mark.parametrize("script", [CONTROL_NET, LLLITE], ids=["control_net", "lllite"])


@dataclass(frozen=True)
class Done:
    """A run that nothing disturbed."""

    folder: Path
    """Of its output."""
    said: str

    @property
    def learned(self) -> dict[str, torch.Tensor]:
        """What was saved in the end."""
        return weights(self.folder / "lines.safetensors")


WholeRun = Callable[[Script], Done]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A dataset file with control images beside the pictures."""
    return write_dataset_with_controls(tmp_path_factory.mktemp("data"), photos)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, dataset: Path) -> WholeRun:
    """Runs each script once, with sample images that follow a guide image and a white one."""

    @cache
    def whole_run_of(script: Script) -> Done:
        out = tmp_path_factory.mktemp("out")
        prompts, white = out / "prompts.txt", out / "white.png"
        Image.new("RGB", (64, 64), "white").save(white)
        guides = (next((dataset.parent / "controls").glob("*.png")), white)
        prompts.write_text("".join(f"a cat --w 64 --h 64 --s 1 --d 1 --cn {each}\n" for each in guides), encoding="utf-8")
        samples = ("--sample_prompts", prompts, "--sample_at_first", "--sample_every_n_steps", "4")
        more = ("--save_every_n_steps", "2", "--save_state", *samples, *script.same_run)
        done = run_command(script.arguments(tiny_checkpoint, dataset, out, *more), script=script.script)
        assert done.returncode == 0, done.stderr
        return Done(out, done.stderr)

    return whole_run_of


@both_scripts
def test_the_network_alone_is_saved_and_says_what_it_is(whole_run: WholeRun, script: Script) -> None:
    done = whole_run(script)
    names = ("lines", "lines-step00000002", "lines-step00000004")
    assert {path.stem for path in done.folder.glob("lines*.safetensors")} == {*names, *(f"{name}-ema" for name in names)}
    with safe_open(done.folder / "lines.safetensors", "pt") as file:
        assert file.metadata()["modelspec.architecture"] == script.architecture
        assert all(key.startswith("modelspec.") for key in file.metadata())
    assert all(tensor.dtype == torch.float32 for tensor in done.learned.values())
    in_state = weights(done.folder / "lines-state" / "model.safetensors")
    assert len(in_state) == len(done.learned), "the state holds the network alone"
    assert "Validation loss" in done.said


@both_scripts
def test_sample_images_follow_their_guide_images_once_something_is_learned(whole_run: WholeRun, script: Script) -> None:
    pictures = [path.read_bytes() for path in sorted((whole_run(script).folder / "sample").glob("*.png"))]
    by_steps, at_first = pictures[:2], pictures[2:]
    assert len(pictures) == 4
    assert at_first[0] == at_first[1], "an untrained network changes nothing"
    assert by_steps[0] != by_steps[1]


@pytest.mark.parametrize(
    ("script", "changed"), [(CONTROL_NET, ()), (LLLITE, ("--blocks_to_swap", "12"))], ids=["control_net", "lllite_swapped"]
)
def test_a_resumed_run_ends_at_the_same_bits(
    whole_run: WholeRun, tiny_checkpoint: Path, dataset: Path, tmp_path: Path, script: Script, changed: tuple[str, ...]
) -> None:
    out = whole_run(script).folder
    more = ("--resume", out / "lines-step00000002-state", *changed, *script.same_run)
    done = run_command(script.arguments(tiny_checkpoint, dataset, tmp_path, *more), script=script.script)
    assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "lines.safetensors", out / "lines.safetensors")


# --- ControlNet ---------------------------------------------------------------------------------------------------------


def test_all_of_a_control_net_learns_and_is_saved_in_the_names_of_diffusers(whole_run: WholeRun, tiny_checkpoint: Path) -> None:
    learned = whole_run(CONTROL_NET).learned
    untrained = SdxlFamily.open(ModelSource(str(tiny_checkpoint))).make_control_net(None, torch.float32, torch.device("cpu"))
    began = {untrained.names[name]: tensor for name, tensor in untrained.state_dict().items()}
    assert {"conv_in.weight", "mid_block.resnets.0.conv1.weight", f"{NEW}cond_embedding.blocks.5.bias"} <= learned.keys()
    assert {name: tensor.shape for name, tensor in learned.items()} == {name: tensor.shape for name, tensor in began.items()}
    still = [name for name in learned if torch.equal(learned[name], began[name])]
    assert still == [], "the copied blocks learn, and the new parts"


def test_going_on_from_a_file_with_the_copied_blocks_frozen(
    whole_run: WholeRun, tiny_checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    before = whole_run(CONTROL_NET).folder / "lines.safetensors"
    more = ("--controlnet_model_name_or_path", before, "--learning_rate", "0", "--max_train_steps", "1")
    done = run_command(CONTROL_NET.arguments(tiny_checkpoint, dataset, tmp_path, *more), script=CONTROL_NET.script)
    assert done.returncode == 0, done.stderr
    again, old = weights(tmp_path / "lines.safetensors"), weights(before)
    moved = {name for name in old if not torch.equal(again[name], old[name])}
    assert moved == {name for name in old if name.startswith(NEW)}
    steps = torch.cat([(again[name] - old[name]).abs().flatten() for name in moved])
    assert steps.median() == pytest.approx(1e-2, rel=0.05), "the first step of AdamW is as long as --control_net_lr"


def test_mistakes_with_a_control_net_are_told_in_sentences(tiny_checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
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
            parse(SdxlTrainControlNetOptions, CONTROL_NET.arguments(tiny_checkpoint, dataset, tmp_path, *more))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n", encoding="utf-8")
    unguided = ("--sample_prompts", prompts, "--sample_at_first")
    for arguments, status, told in (
        (unguided, 2, "line 1: there is no image that the picture is to follow"),
        ((given, tiny_checkpoint), 1, f"{tiny_checkpoint} is no ControlNet in diffusers' layout"),
    ):
        done = run_command(CONTROL_NET.arguments(tiny_checkpoint, dataset, tmp_path / "no", *arguments), script=CONTROL_NET.script)
        assert done.returncode == status and told in done.stderr and "Traceback" not in done.stderr, done.stderr


# --- ControlNet-LLLite --------------------------------------------------------------------------------------------------


def test_all_modules_of_lllite_learn_and_are_saved_with_their_sizes(whole_run: WholeRun, tiny_checkpoint: Path) -> None:
    done = whole_run(LLLITE)
    learned = done.learned
    assert widths_of(learned, "lines") == Widths(8, 4)
    unet = SdxlFamily.open(ModelSource(str(tiny_checkpoint))).load_denoiser(torch.float32, torch.device("cpu"))
    assert {name: tensor.shape for name, tensor in learned.items()} == {
        name: tensor.shape for name, tensor in ControlNetLLLite(unet, Widths(8, 4)).state_dict().items()
    }
    assert set(weights(done.folder / "lines-state" / "model.safetensors")) == set(learned)
    ups = [tensor for name, tensor in learned.items() if name.endswith(".up.0.weight")]
    assert all(tensor.any() for tensor in ups), "all modules learned, and began at zero"
    first = weights(done.folder / "lines-step00000002.safetensors")
    seen = [name for name in learned if ".conditioning1." in name and not torch.equal(first[name], learned[name])]
    assert seen, "what sees the control images is trained too"


def test_going_on_from_a_network_and_from_folders_without_a_file(
    whole_run: WholeRun, tiny_checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    before = whole_run(LLLITE).folder / "lines.safetensors"
    folders = ("--train_data_dir", dataset.parent / "images", "--conditioning_data_dir", dataset.parent / "controls")
    words = LLLITE.arguments(tiny_checkpoint, dataset, tmp_path, *folders, "--resolution", "64", "--caption_extension", ".txt")
    del words[2:4]
    more = ("--network_weights", str(before), "--max_train_steps", "1", "--learning_rate", "1e-9")
    done = run_command([*words, *more], script=LLLITE.script)
    assert done.returncode == 0, done.stderr
    again, old = weights(tmp_path / "lines.safetensors"), weights(before)
    assert all(torch.allclose(again[name], old[name], atol=1e-7) for name in old)
    unet = SdxlFamily.open(ModelSource(str(tiny_checkpoint))).load_denoiser(torch.float32, torch.device("cpu"))
    assert from_file(unet, str(tmp_path / "lines.safetensors")).widths == (8, 4)


def test_mistakes_with_lllite_are_told_in_sentences(
    whole_run: WholeRun,
    tiny_checkpoint: Path,
    dataset: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
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
    seen_at_once: list[tuple[tuple[object, ...], list[str]]] = [
        (("--cond_emb_dim", "7", "--network_dim", "0"), ["--cond_emb_dim is 7, but it must be even", "--network_dim is missing"]),
        (("--network_weights", "nowhere.safetensors"), ["there is no file nowhere.safetensors"]),
        (("--masked_loss",), ["--masked_loss"]),
        (("--learning_rate", "0"), ["--learning_rate is 0, so nothing is trained"]),
        (("--dataset_config", plain), ["there are no control images for"]),
        (("--dataset_config", cropped), ["random_crop of", "cannot be used with control images"]),
        (drawn, ["line 1: there is no image that the picture is to follow", "there is no image nowhere.png (--cn)"]),
    ]
    monkeypatch.setattr(sdxl_train_control_net_lllite, "set_up_logging", lambda console: None)
    for more, told in seen_at_once:
        with pytest.raises(UsageError) as found:
            sdxl_train_control_net_lllite.main(LLLITE.arguments(tiny_checkpoint, dataset, tmp_path / "no", *more))
        assert [each for each in told if each not in str(found.value)] == [], more
    learned = whole_run(LLLITE).folder / "lines.safetensors"
    cases: list[tuple[tuple[object, ...], int, list[str]]] = [
        (drawn, 2, ["line 1: there is no image that the picture is to follow"]),
        (("--dataset_config", missing), 1, ["has no control or mask image"]),
        (("--dataset_config", sized), 1, ["is 32x32, but its image", "Make them equal"]),
        (("--network_weights", learned, "--network_dim", "6"), 1, ["The file has --cond_emb_dim 8 and --network_dim 4"]),
    ]
    for more, status, told in cases:
        done = run_command(LLLITE.arguments(tiny_checkpoint, dataset, tmp_path / "no", *more), script=LLLITE.script)
        assert (done.returncode, [each for each in told if each not in done.stderr]) == (status, []), (more, done.stderr)
        assert "Traceback" not in done.stderr
