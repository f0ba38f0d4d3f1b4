"""`sdxl_train_network.py` as a person runs it: files, resuming, stopping, sample images."""

import json
import signal
from itertools import groupby
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.cli.training_commands import (
    Blow,
    arguments,
    assert_same_bits,
    resume_arguments,
    run_command,
    weights,
    write_dataset,
)


@pytest.fixture
def dataset(tmp_path: Path, photos: Path) -> Path:
    return write_dataset(tmp_path, photos)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, photos: Path) -> tuple[Path, Path]:
    """The output folder and dataset of a run of six steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    dataset = write_dataset(folder, photos)
    more = [
        "--save_every_n_steps",
        "2",
        "--save_state",
        "--gradient_accumulation_steps",
        "2",
        "--logging_dir",
        str(folder / "logs"),
    ]
    done = run_command(arguments(tiny_checkpoint, dataset, folder / "out", *more))
    assert done.returncode == 0, done.stderr
    return folder, dataset


def test_a_run_writes_the_network_its_states_and_its_log(whole_run: tuple[Path, Path]) -> None:
    folder, _ = whole_run
    names = {path.name for path in (folder / "out").iterdir()}
    steps = [f"net-step0000000{n}" for n in (2, 4, 6)]
    written = ("net.safetensors", "net-state", "net-run.json")
    assert names == {*(f"{s}.safetensors" for s in steps), *(f"{s}-state" for s in steps), *written}
    manifest = json.loads((folder / "out" / "net-run.json").read_text(encoding="utf-8"))
    assert manifest["end"]["outcome"] == "complete" and manifest["end"]["step"] == 6
    assert {Path(saved["path"]).name for saved in manifest["saved"]} == names - {"net-run.json"}
    assert [each["part"] for each in manifest["trained"]] == ["textencoder1", "textencoder2", "unet"]
    assert list((folder / "logs").glob("*/network_train/events.out.*"))


def test_the_trained_weights_changed_and_the_file_describes_itself(whole_run: tuple[Path, Path]) -> None:
    path = whole_run[0] / "out" / "net.safetensors"
    found = weights(path)
    ups = [tensor for name, tensor in found.items() if name.endswith("lora_up.weight")]
    assert {name.split("_")[1] for name in found} == {"te1", "te2", "unet"}
    # The last layer of the first encoder has no influence on the context, and keeps its zeros.
    assert sum(bool(tensor.any()) for tensor in ups) >= len(ups) - 6
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_steps"] == "6" and metadata["ss_network_dim"] == "4" and metadata["ss_seed"] == "11"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert json.loads(metadata["ss_datasets"])[0]["num_train_images"] == 5
    assert len(metadata["sshs_model_hash"]) == 64


def test_a_run_stopped_killed_and_resumed_twice_ends_with_the_same_bits(
    whole_run: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder, dataset = whole_run
    more = ["--save_every_n_steps", "2", "--save_state", "--gradient_accumulation_steps", "2"]
    args = arguments(tiny_checkpoint, dataset, tmp_path, *more, "--huggingface_token", "hf_secret")
    stopped = run_command(args, blow=Blow(signal.SIGTERM, batch=0))
    assert stopped.returncode == 143, stopped.stderr
    assert "hf_secret" not in stopped.stderr and "shown without --huggingface_token" in stopped.stderr
    command = resume_arguments(stopped.stderr)
    assert command[-2:] == ["--resume", str(tmp_path / "net-step00000001-state")]

    killed = run_command(command, blow=Blow(signal.SIGKILL, batch=2))  # in the middle of an update
    assert killed.returncode == signal.SIGKILL and not (tmp_path / "net.safetensors").exists()
    watch = tmp_path / "watch"
    watch.mkdir()
    (watch / "prompts.txt").write_text("a red house --s 1\n", encoding="utf-8")
    watching = ["--sample_prompts", str(watch / "prompts.txt"), "--sample_every_n_steps", "2", "--sample_every_n_epochs", "-1"]
    watching += ["--loss_ledger", "--log_grad_norm", "--log_events", str(watch / "events.jsonl")]
    resumed = run_command([*args, "--resume", str(tmp_path / "net-step00000002-state"), *watching])
    assert resumed.returncode == 0, resumed.stderr
    names = {path.name for path in (folder / "out").iterdir()}
    ours = {"net-step00000001.safetensors", "net-step00000001-state", "net-losses.csv", "sample", "watch"}
    assert {path.name for path in tmp_path.iterdir()} - names == ours
    assert_same_bits(tmp_path / "net.safetensors", folder / "out" / "net.safetensors")
    assert_same_bits(tmp_path / "net-step00000004.safetensors", folder / "out" / "net-step00000004.safetensors")
    places = [json.loads((root / "net-state" / "train_state.json").read_text()) for root in (tmp_path, folder / "out")]
    assert places[0] == places[1] and places[0]["current_step"] == 6
    events = [json.loads(line) for line in (watch / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "sample"] == [4, 6]
    assert {"grad_norm/unet", "grad_norm/all"} < next(event for event in events if event["kind"] == "step")["norms"].keys()
    assert "--sample_every_n_epochs is below 1 and is ignored." in resumed.stderr

    other = [*args, "--learning_rate", "1e-4", "--output_dir", str(tmp_path / "other")]
    refused = run_command([*other, "--resume", str(tmp_path / "net-step00000004-state")])
    assert refused.returncode == 1 and "- --learning_rate was 0.001 and is 0.0001\nUse what it was saved with" in refused.stderr
    wider = [*args, "--network_dim", "8", "--output_dir", str(tmp_path / "other"), "--resume_changed"]
    refused = run_command([*wider, "--resume", str(tmp_path / "net-step00000004-state")])
    said = [line for line in refused.stderr.splitlines() if "was saved while something else was trained" in line]
    assert refused.returncode == 1 and said[0].startswith("--resume: "), "a line of its own, not behind the progress bar"


def test_sample_images_and_both_caches(dataset: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    dataset.write_text(dataset.read_text().replace("shuffle_caption", "caption_dropout_rate = 0.4\nshuffle_caption"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two pictures\na red house --d 3 --s 2\na tree --w 96 --h 64 --s 2 --l 1\n", encoding="utf-8")
    more = [
        "--sample_prompts",
        str(prompts),
        "--sample_at_first",
        "--sample_every_n_epochs",
        "1",
        "--max_train_epochs",
        "2",
        "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk",
        "--text_cache_variants",
        "3",
        "--gradient_checkpointing",
        "--mixed_precision",
        "bf16",
        "--save_every_n_epochs",
        "1",
        "--save_precision",
        "fp16",
        "--log_events",
        str(tmp_path / "logs" / "events.jsonl"),
    ]
    done = run_command(arguments(tiny_checkpoint, dataset, tmp_path / "out", *more))
    assert done.returncode == 0, done.stderr
    assert "the U-Net alone is trained" in done.stderr
    events = [json.loads(line) for line in (tmp_path / "logs" / "events.jsonl").read_text().splitlines()]
    told = [kind for kind, _ in groupby(event["kind"] for event in events if event["kind"] not in ("warning", "sample"))]
    assert told == ["start", "step", "saved", "step", "saved", "end"]
    assert events[-1]["outcome"] == "complete"
    assert "the U-Net alone is trained" in " ".join(event.get("message") or "" for event in events)
    saved = [event for event in events if event["kind"] == "saved"]
    assert [(Path(event["path"]).name, event["occasion"], event["step"]) for event in saved] == [
        ("net-000001.safetensors", "epoch", 3), ("net.safetensors", "final", 6),
    ]  # fmt: skip
    assert "those of 5 images become 16 texts (--text_cache_variants 3)" in done.stderr
    pictures = sorted(path.name for path in (tmp_path / "out" / "sample").iterdir())
    assert [name[:14] for name in pictures] == [f"net_e00000{e}_0{i}" for e in range(3) for i in range(2)]
    assert pictures[0].endswith("_3.png")
    sizes = [Image.open(tmp_path / "out" / "sample" / name).size for name in pictures[:2]]
    assert sizes == [(64, 64), (96, 64)]
    found = weights(tmp_path / "out" / "net-000001.safetensors")
    assert {name.split("_")[1] for name in found} == {"unet"} and {tensor.dtype for tensor in found.values()} == {torch.float16}
    suffixes = sorted("_".join(path.name.split("_")[1:]) for path in (tmp_path / "images").glob("*.npz"))
    assert len([name for name in suffixes if name.endswith("te_outputs.npz")]) == 6
    assert len([name for name in suffixes if name.endswith("sdxl.npz")]) == 5


@pytest.mark.parametrize(
    "more",
    [
        ["--optimizer_type", "AdamW8bit", "--lr_scheduler", "cosine", "--lr_warmup_steps", "1"],
        [
            "--optimizer_type",
            "Adafactor",
            "--optimizer_args",
            "relative_step=False",
            "scale_parameter=False",
            "--scale_weight_norms",
            "1",
        ],
        ["--optimizer_type", "AdamW8bit", "--mixed_precision", "bf16", "--full_bf16", "--fused_backward_pass"],
    ],
    ids=["AdamW8bit", "Adafactor", "bfloat16 fused"],
)
def test_optimizers_run(more: list[str], dataset: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    args = arguments(tiny_checkpoint, dataset, tmp_path / "out", "--max_train_steps", "2", "--network_train_unet_only", *more)
    done = run_command(args)
    assert done.returncode == 0, done.stderr
    (row,) = [line.split() for line in done.stderr.splitlines() if line.split()[:2] == ["unet", "U-Net"]]
    assert row[-3:] == ["0" if "--lr_warmup_steps" in more else "0.001", "0.001", "0.001"]
    ups = [tensor for name, tensor in weights(tmp_path / "out" / "net.safetensors").items() if name.endswith("lora_up.weight")]
    assert all(tensor.isfinite().all() for tensor in ups) and any(tensor.any() for tensor in ups)
