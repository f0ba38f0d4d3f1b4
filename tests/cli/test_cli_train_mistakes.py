"""What a person reads after a mistake: one sentence that names the thing and the way out, and an exit status."""

import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

import sdxl_train_network
from library.options.errors import UsageError, UserError
from library.training import recipe
from tests.cli.training_commands import ROOT, SCRIPT, Blow, arguments, environment, run_command, write_dataset


@pytest.fixture
def dataset(tmp_path: Path, photos: Path) -> Path:
    return write_dataset(tmp_path, photos, count=3)


def cut_off(checkpoint: Path, folder: Path) -> Path:
    path = folder / "cut.safetensors"
    path.write_bytes(checkpoint.read_bytes()[:100_000])
    return path


def a_lora(checkpoint: Path, folder: Path) -> Path:
    path = folder / "lora.safetensors"
    save_file({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": zeros(4, 4)}, path)
    return path


def an_sd1_model(checkpoint: Path, folder: Path) -> Path:
    path = folder / "sd1.safetensors"
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    save_file({name: zeros(4, 4), "model.diffusion_model.input_blocks.0.0.weight": zeros(320, 4, 3, 3)}, path)
    return path


def a_web_page(checkpoint: Path, folder: Path) -> Path:
    path = folder / "page.safetensors"
    path.write_text("<html>404 not found</html>")
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (cut_off, ["cut.safetensors", "bytes"]),
        (a_lora, ["lora.safetensors", "LoRA"]),
        (an_sd1_model, ["sd1.safetensors", "Stable Diffusion 1"]),
        (a_web_page, ["page.safetensors", "web page"]),
    ],
)
def test_a_file_that_is_no_sdxl_model_is_told_for_what_it_is(
    make: Callable[[Path, Path], Path], words: list[str], dataset: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as told:
        sdxl_train_network.main(arguments(make(tiny_checkpoint, tmp_path), dataset, tmp_path / "out"))
    assert all(word in str(told.value) for word in words), told.value


def test_everything_wrong_is_told_at_once(dataset: Path, tmp_path: Path) -> None:
    dataset.write_text(dataset.read_text().replace("num_repeats", "num_repeat"))
    prompts = tmp_path / "prompts.toml"
    prompts.write_text('[prompt]\nwidht = 64\n[[prompt.subset]]\nprompt = "a cat"\n')
    config = tmp_path / "options.toml"
    config.write_text('learning_rate = "fast"\n')
    done = run_command(
        arguments(
            tmp_path / "missing.safetensors",
            dataset,
            tmp_path / "out",
            "--netwrok_dim",
            "4",
            "--optimizer_type",
            "Adamw9",
            "--config_file",
            str(config),
            "--sample_every_n_steps",
            "1",
            "--sample_prompts",
            str(prompts),
            "--network_args",
            "conv_dimm=4",
        )
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for words in [
        "--netwrok_dim",
        "--network_dim",
        "missing.safetensors",
        "num_repeat",
        "num_repeats",
        "Adamw9",
        "learning_rate",
        "'fast'",
        "widht",
        "width",
        "conv_dimm",
        "conv_dim",
    ]:
        assert words in done.stderr, (words, done.stderr)


def test_all_bad_images_and_captions_are_named_together(dataset: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pictures = sorted((tmp_path / "images").glob("*.jpg"))
    pictures[0].write_bytes(pictures[0].read_bytes()[:-500])
    (tmp_path / "images" / "empty.png").write_bytes(b"")
    pictures[1].with_suffix(".txt").write_bytes("ein Käfer".encode("latin-1"))
    with pytest.raises(UserError) as told:
        sdxl_train_network.main(arguments(tiny_checkpoint, dataset, tmp_path / "out"))
    message = str(told.value)
    assert pictures[0].name in message and "empty.png" in message
    assert pictures[1].with_suffix(".txt").name in message and "UTF-8" in message


def test_a_folder_without_images_is_named(dataset: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "images").glob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match="images"):
        sdxl_train_network.main(arguments(tiny_checkpoint, dataset, tmp_path / "out"))


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_a_disk_that_takes_no_more_leaves_the_earlier_file_whole(dataset: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "net.safetensors").write_bytes(b"the network of yesterday")
    args = arguments(tiny_checkpoint, dataset, out, "--max_train_steps", "1", "--network_train_unet_only", "--network_dim", "16")
    done = subprocess.run(
        [sys.executable, SCRIPT, *args],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "net.safetensors" in done.stderr
    assert {path.name for path in out.iterdir()} <= {"net.safetensors", "net-run.json"}
    assert (out / "net.safetensors").read_bytes() == b"the network of yesterday"


def test_a_run_stopped_in_its_last_step_is_finished_and_has_nothing_left_to_resume(
    dataset: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    args = arguments(tiny_checkpoint, dataset, tmp_path / "out", "--max_train_steps", "1", "--save_state_on_train_end")
    done = run_command(args, blow=Blow(signal.SIGTERM, batch=0))
    assert done.returncode == 0 and "Stopping after this step" in done.stderr and "--resume" not in done.stderr
    assert (tmp_path / "out" / "net.safetensors").is_file()
    with pytest.raises(UserError, match="Nothing is left to train"):
        sdxl_train_network.main([*args, "--resume", str(tmp_path / "out" / "net-state")])


def test_an_output_folder_that_cannot_be_made_is_told_before_anything_is_loaded(
    dataset: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(recipe, "prepare_text", lambda *parts: loaded.append(parts))
    with pytest.raises(UserError, match="the file name is too long"):
        sdxl_train_network.main(arguments(tiny_checkpoint, dataset, tmp_path / ("x" * 300)))
    assert loaded == []


def test_places_for_reports_and_logs_that_cannot_be_used_are_told_with_the_other_mistakes(
    dataset: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    below, settings = str(tmp_path / "file" / "below"), str(tmp_path / "none.toml")
    given = ["--dataset_report", below, "--logging_dir", below, "--log_tracker_config", settings, "--optimizer_type", "Adamw9"]
    with pytest.raises(UsageError, match="Adamw9") as told:
        sdxl_train_network.main(arguments(tiny_checkpoint, dataset, tmp_path / "out", *given))
    for option in ("--dataset_report", "--logging_dir"):
        assert f"{option} {below} cannot be made, because {tmp_path / 'file'} is a file." in told.value.problems
    assert f"--log_tracker_config {settings} cannot be read (No such file or directory): check the path." in told.value.problems
