"""`sdxl_train.py` as a person runs it: what is trained and what is not, resuming, layouts, mistakes."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from tests.cli.training_commands import (
    FINETUNE,
    Blow,
    assert_same_bits,
    finetune_arguments,
    resume_arguments,
    run_command,
    weights,
    write_dataset,
)

FUSED_BF16 = [
    *("--mixed_precision", "bf16", "--full_bf16", "--gradient_checkpointing", "--fused_backward_pass", "--max_grad_norm", "0"),
    *("--optimizer_type", "Adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False", "warmup_init=False"),
]
UNET, TE1, TE2 = "model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1."


def finetune(*args: object, launcher: tuple[str, ...] = ()) -> str:
    done = run_command(finetune_arguments(*args), launcher, FINETUNE)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    return done.stderr


def changed(before: Path, after: Path) -> set[str]:
    """Return the names of tensors that differ in type or value."""
    one, other = weights(before), weights(after)
    assert one.keys() == other.keys()
    return {name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, photos: Path) -> tuple[Path, Path, list[str]]:
    """The output folder, dataset and options of a run of U-Net and text encoders that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    dataset = write_dataset(folder, photos, count=4)
    more = ["--train_text_encoder", "--learning_rate_te1", "1e-4", "--gradient_accumulation_steps", "2", "--gradient_checkpointing"]
    more += ["--save_every_n_steps", "2", "--save_state", "--optimizer_type", "AdamW8bit"]
    finetune(tiny_checkpoint, dataset, folder / "out", *more)
    return folder / "out", dataset, more


def test_a_run_trains_both_encoders_and_the_u_net_and_nothing_else(whole_run, tiny_checkpoint: Path) -> None:
    out, _, _ = whole_run
    names = {path.name for path in out.iterdir()}
    steps = [f"model-step0000000{n}" for n in (2, 4)]
    written = ("model.safetensors", "model-state", "model-run.json")
    assert names == {*(f"{s}.safetensors" for s in steps), *(f"{s}-state" for s in steps), *written}
    found = changed(tiny_checkpoint, out / "model.safetensors")
    source = weights(tiny_checkpoint)
    unused = ("encoder.layers.2.", "final_layer_norm")  # of TE1: the context is taken before them
    wanted = {n for n in source if n.startswith((UNET, TE1, TE2)) and not (n.startswith(TE1) and any(u in n for u in unused))}
    assert found == wanted - {f"{TE2}model.logit_scale"}
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base"


def test_a_run_stopped_killed_and_resumed_twice_ends_with_the_same_bits(whole_run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out, dataset, more = whole_run
    args = finetune_arguments(tiny_checkpoint, dataset, tmp_path, *more)
    stopped = run_command(args, script=FINETUNE, blow=Blow(signal.SIGTERM, batch=0))
    assert stopped.returncode == 143, stopped.stderr
    killed = run_command(resume_arguments(stopped.stderr), script=FINETUNE, blow=Blow(signal.SIGKILL, batch=3))
    assert killed.returncode == signal.SIGKILL
    resumed = run_command([*args, "--resume", str(tmp_path / "model-step00000002-state")], script=FINETUNE)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_bits(tmp_path / "model.safetensors", out / "model.safetensors")


def test_bfloat16_weights_stepped_in_the_backward_pass_resume_bit_for_bit_with_blocks_in_main_memory(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    dataset = write_dataset(tmp_path, photos, count=4)
    more = [*FUSED_BF16, "--save_every_n_steps", "1", "--save_state", "--ema_decay", "0.9"]
    finetune(tiny_checkpoint, dataset, tmp_path / "whole", *more)
    more += ["--offload_fraction", "0.6", "--resume", str(tmp_path / "whole" / "model-step00000001-state")]
    finetune(tiny_checkpoint, dataset, tmp_path / "resumed", *more)
    for name in ("model", "model-ema", "model-step00000003-state/model"):
        assert_same_bits(tmp_path / "resumed" / f"{name}.safetensors", tmp_path / "whole" / f"{name}.safetensors")
    saved = weights(tmp_path / "whole" / "model.safetensors")
    assert {tensor.dtype for name, tensor in saved.items() if name.startswith(UNET)} == {torch.bfloat16}
    assert {name.startswith(UNET) for name in changed(tiny_checkpoint, tmp_path / "whole" / "model.safetensors")} == {True}


def test_a_block_with_rate_0_is_written_back_bit_for_bit(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    rates = ["1e-3"] * 23
    rates[0] = rates[4] = rates[11] = rates[22] = "0"
    dataset = write_dataset(tmp_path, photos, count=2)
    more = ["--block_lr", ",".join(rates), "--max_train_steps", "1", "--cache_latents"]
    said = finetune(tiny_checkpoint, dataset, tmp_path / "out", *more)
    rows = [line.split() for line in said.splitlines() if " U-Net " in line]
    assert {row[0] for row in rows}.isdisjoint({"block0", "block4", "block11", "block22"}) and len(rows) > 3
    assert all(row[-3:] == ["0.001"] * 3 for row in rows)
    frozen = tuple(f"{UNET}{block}." for block in ("time_embed", "label_emb", "input_blocks.3", "middle_block.1", "out"))
    source = {name for name in weights(tiny_checkpoint) if name.startswith(UNET)}
    assert changed(tiny_checkpoint, tmp_path / "out" / "model.safetensors") == {n for n in source if not n.startswith(frozen)}


@pytest.mark.parametrize(
    ("layout", "name"), [("ckpt", "model.ckpt"), ("diffusers", "model"), ("diffusers_safetensors", "model")], ids=str
)
def test_models_are_saved_in_every_layout(layout: str, name: str, tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, photos, count=2)
    more = ["--save_model_as", layout, "--max_train_steps", "1", "--v_parameterization", "--save_precision", "bf16"]
    more += ["--learning_rate", "0", "--train_text_encoder", "--learning_rate_te1", "0", "--learning_rate_te2", "1e-3"]
    finetune(tiny_checkpoint, dataset, tmp_path / "out", *more)
    family = SdxlFamily.open(ModelSource(str(tmp_path / "out" / name)))
    source = SdxlFamily.open(ModelSource(str(tiny_checkpoint)))
    assert family.declared_prediction() == "v"
    for part, entries in family.checkpoint.parts.items():
        same = all(torch.equal(entry.read(), source.checkpoint.parts[part][n].read().bfloat16()) for n, entry in entries.items())
        assert same == (part != "te2"), part


def test_a_metadata_file_and_sample_images(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, photos, count=2)
    lines = [f'{{"image_path": "{path.name}", "caption": "a photo"}}' for path in sorted((tmp_path / "images").glob("*.jpg"))]
    (tmp_path / "meta.jsonl").write_text("\n".join(lines))
    (tmp_path / "prompts.txt").write_text("a red house --d 3 --s 2\n")
    args = finetune_arguments(tiny_checkpoint, tmp_path / "unused", tmp_path / "out", "--max_train_steps", "2")
    del args[args.index("--dataset_config") : args.index("--dataset_config") + 2]
    args += ["--in_json", str(tmp_path / "meta.jsonl"), "--train_data_dir", str(tmp_path / "images"), "--resolution", "64"]
    args += ["--cache_latents_to_disk", "--cache_text_encoder_outputs", "--optimizer_type", "AdamWScheduleFree"]
    args += ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2"]
    done = run_command(args, script=FINETUNE)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out" / "sample").glob("model_000002_00_*_3.png"))) == 1
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--learning_ratte_te1", "1"], "--learning_ratte_te1 is not an option. Did you mean --learning_rate_te1?"),
        (["--block_lr", "1,2"], "23 learning rates with commas are wanted"),
        (["--pretrained_model_name_or_path", "missing.safetensors"], "there is no file or folder missing.safetensors"),
        (["--network_module", "networks.lora"], "--network_module is an option of other scripts"),
    ],
)
def test_mistakes_are_told_in_a_sentence_with_status_2(
    more: list[str], words: str, tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    dataset = write_dataset(tmp_path, photos, count=1)
    done = run_command(finetune_arguments(tiny_checkpoint, dataset, tmp_path / "out", *more), script=FINETUNE)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
