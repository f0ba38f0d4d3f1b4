"""Both training scripts in several processes, which train what one process trains."""

import signal
from collections.abc import Callable, Mapping
from dataclasses import astuple
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from library.training.loss_ledger import read_ledger
from tests.cli import test_cli_train_control_nets as control_nets
from tests.cli import test_cli_train_textual_inversion as train_word
from tests.cli.training_commands import (
    FINETUNE,
    ROOT,
    SCRIPT,
    Blow,
    arguments,
    assert_same_bits,
    environment_launched,
    finetune_arguments,
    resume_arguments,
    run_processes,
    weights,
    write_dataset,
)

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is optional")
ON_CPU = {"DS_ACCELERATOR": "cpu"}
EXAMPLES = ROOT / "examples" / "accelerate"
PLAIN = ["--optimizer_type", "SGD", "--max_grad_norm", "0"]
"""Steps as large as the gradients are, of which every share counts."""


def scalars(logs: Path) -> dict[str, list[float]]:
    (folder,) = logs.glob("*/*")
    events = EventAccumulator(str(folder)).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def run_both(
    folder: Path,
    make: object,
    checkpoint: Path,
    photos: Path,
    script: str,
    *more: str,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], object] | None = None,
) -> dict[int, str]:
    """Run a script in two processes of two images, in an environment, and in one of four; returns what each first process said."""
    said = {}
    for count in (1, 2):
        dataset = write_dataset(folder / f"data{count}", photos, batch_size=4 // count, count=7)
        text = dataset.read_text().replace(f"data{count}/images", "data1/images")
        dataset.write_text(text.replace("[general]", "[general]\nvalidation_split = 0.3\nvalidation_seed = 1"))
        paths = ["--logging_dir", str(folder / f"logs{count}")]
        args = make(checkpoint, dataset, folder / str(count), *PLAIN, *more, *paths)  # type: ignore[operator]
        done = run_processes(args, script, count=count, more=environment if count > 1 else None, prepare=prepare)
        assert done.returncode == 0, done.stderr
        said[count] = done.stderr
    return said


def assert_same_run(folder: Path, name: str) -> None:
    """Hold that two processes wrote the files, weights and figures that one wrote."""
    files = [{path.relative_to(folder / count).as_posix() for path in (folder / count).rglob("*")} for count in ("1", "2")]
    assert {file.rpartition("_2")[0] or file for file in files[0]} == {file.rpartition("_2")[0] or file for file in files[1]}
    ours, theirs = (weights(folder / count / name) for count in ("1", "2"))
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    one, two = (scalars(folder / f"logs{count}") for count in ("1", "2"))
    assert one.keys() == two.keys() and len(one["loss/average"]) > 1
    for key, values in one.items():
        assert two[key] == pytest.approx(values, rel=1e-4, abs=1e-6), key


def test_a_network_trained_in_two_processes_is_that_of_one(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    """Two epochs with uneven shares and windows, text encoders, saves, states, held-out images and sample images."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red house --s 1\na tree --s 1\na road --s 1\n", encoding="utf-8")
    more = ["--gradient_accumulation_steps", "2", "--network_dropout", "0", "--learning_rate", "0.5", "--max_train_epochs", "2"]
    more += ["--save_every_n_epochs", "1", "--save_state", "--sample_prompts", str(prompts), "--sample_every_n_epochs", "2"]
    more += ["--ddp_gradient_as_bucket_view", "--loss_ledger"]
    said = run_both(tmp_path, arguments, tiny_checkpoint, photos, SCRIPT, *more)
    assert_same_run(tmp_path, "net.safetensors")
    one, two = (sorted(map(astuple, read_ledger(tmp_path / count / "net-losses.csv"))) for count in ("1", "2"))
    assert len(one) == 5 and {image[1] for image in one} == {2}
    for first, second in zip(one, two, strict=True):
        assert second[:2] == first[:2] and second[2:] == pytest.approx(first[2:], rel=1e-3)
    assert said[2].count("Validation loss") == 2 and "processes: 2" in said[2]
    assert len(list((tmp_path / "2" / "sample").glob("net_e000002_0[012]_*.png"))) == 3
    with safe_open(tmp_path / "2" / "net.safetensors", "pt") as file:
        assert file.metadata()["ss_steps"]
    assert any(tensor.any() for key, tensor in weights(tmp_path / "2" / "net.safetensors").items() if "lora_up" in key)


def test_a_model_trained_in_two_processes_is_that_of_one(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    more = ["--learning_rate", "0.01", "--train_text_encoder", "--learning_rate_te1", "0.01", "--max_train_epochs", "1"]
    more += ["--gradient_checkpointing", "--ddp_static_graph", "--save_every_n_steps", "1", "--log_grad_norm"]
    run_both(tmp_path, finetune_arguments, tiny_checkpoint, photos, FINETUNE, *more)
    assert_same_run(tmp_path, "model.safetensors")
    assert {"loss", "loss/epoch", "lr/unet", "lr/text_encoder1", "grad_norm/text_encoder1", "grad_norm/all"} <= scalars(
        tmp_path / "logs2"
    ).keys()
    before, after = weights(tiny_checkpoint), weights(tmp_path / "2" / "model.safetensors")
    changed = [name for name in after if not torch.equal(before[name].float(), after[name].float())]
    assert {name.partition(".layers")[0] for name in changed if "layers.0.mlp" in name or "input_blocks.0.0.weight" in name}


def divide_small_weights() -> None:
    """Let DeepSpeed divide the weights of a tiny model too, and step them in several groups, as it does those of a large one."""
    from library.training import engine, zero

    def config(*given: Any) -> dict[str, Any]:
        made = zero.zero_config(*given)
        made["zero_optimization"] |= {"stage3_param_persistence_threshold": 16, "sub_group_size": 300_000}
        return made

    patch.object(engine, "zero_config", config).start()


@pytest.mark.parametrize(
    ("config", "without", "told"),
    [
        ("fsdp2.yaml", "nothing", "Divided over 2 processes (FSDP2)"),
        pytest.param("zero3.yaml", "nothing", "(DeepSpeed, ZeRO stage 3)", marks=needs_deepspeed),
        pytest.param("zero3.yaml", "OFFLOAD", "(DeepSpeed, ZeRO stage 3)", marks=needs_deepspeed),
    ],
)
def test_a_model_divided_over_two_processes_is_that_of_one(
    config: str, without: str, told: str, tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    """Clipped and accumulated gradients, whole files, sample images, held-out images, and a state that is gone on from.

    What divides is asked for with an example's configuration, without the settings named.
    """
    launched = environment_launched(EXAMPLES / config)
    divided = {name: value for name, value in launched.items() if without not in name} | ON_CPU
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a house --s 1\na tree --s 1\na road --s 1\n", encoding="utf-8")
    more = ["--learning_rate", "0.05", "--train_text_encoder", "--optimizer_args", "momentum=0.9", "--max_grad_norm", "0.5"]
    more += ["--gradient_accumulation_steps", "2", "--gradient_checkpointing", "--max_train_epochs", "2", "--save_state"]
    more += ["--save_every_n_epochs", "1", "--sample_prompts", str(prompts), "--sample_every_n_epochs", "2"]
    how = (finetune_arguments, tiny_checkpoint, photos, FINETUNE)
    said = run_both(tmp_path, *how, *more, environment=divided, prepare=divide_small_weights)
    assert told in said[2]
    assert_same_run(tmp_path, "model.safetensors")
    assert_same_run(tmp_path, "model-state/model.safetensors")

    state = ["--resume", str(tmp_path / "2" / "model-000001-state"), "--validation_split", "0.3", "--validation_seed", "1"]
    args = finetune_arguments(tiny_checkpoint, tmp_path / "data2" / "dataset.toml", tmp_path / "resumed")
    done = run_processes([*args, *PLAIN, *more[:-4], *state], FINETUNE, more=divided, prepare=divide_small_weights)
    assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "resumed" / "model.safetensors", tmp_path / "2" / "model.safetensors")


def test_two_processes_draw_what_they_would_have_drawn_after_one_of_them_was_stopped(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    more = ["--max_train_steps", "4", "--network_train_unet_only", "--gradient_accumulation_steps", "2"]
    dataset = write_dataset(tmp_path, photos)
    whole = run_processes(arguments(tiny_checkpoint, dataset, tmp_path / "whole", *more))
    assert whole.returncode == 0, whole.stderr
    args = arguments(tiny_checkpoint, dataset, tmp_path / "parts", *more)
    stopped = run_processes(args, blow=Blow(signal.SIGINT, batch=2, rank=1))
    assert stopped.returncode == 130 and "torchrun --nproc_per_node 2" in stopped.stderr, stopped.stderr
    assert (tmp_path / "parts" / "net-step00000002-state").is_dir()
    resumed = run_processes(resume_arguments(stopped.stderr))
    assert resumed.returncode == 0, resumed.stderr
    assert_same_bits(tmp_path / "parts" / "net.safetensors", tmp_path / "whole" / "net.safetensors")


@needs_deepspeed
@pytest.mark.parametrize("stage", ["0", "1", "2", "1 --offload_optimizer_device cpu", "2 --offload_optimizer_device cpu"])
def test_deepspeed_divides_the_work_of_two_processes_and_goes_on_from_its_state(
    stage: str, tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    more = ["--network_dropout", "0", "--gradient_accumulation_steps", "2", "--max_grad_norm", "0.5", "--max_train_epochs", "2"]
    more += ["--optimizer_args", "momentum=0.9", "--learning_rate", "0.5", "--save_every_n_epochs", "1", "--save_state"]
    for count in (1, 2):
        dataset = write_dataset(tmp_path / f"data{count}", photos, batch_size=4 // count, count=7)
        dataset.write_text(dataset.read_text().replace(f"data{count}/images", "data1/images"))
        args = arguments(
            tiny_checkpoint, dataset, tmp_path / str(count), *PLAIN, *more, "--logging_dir", str(tmp_path / f"logs{count}")
        )
        zero = ["--deepspeed", "--zero_stage", *stage.split()] if count == 2 else []
        done = run_processes([*args, *zero], count=count, more=ON_CPU)
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path, "net.safetensors")
    args = arguments(tiny_checkpoint, dataset, tmp_path / "resumed", *PLAIN, *more, *zero)
    done = run_processes([*args, "--resume", str(tmp_path / "2" / "net-000001-state")], more=ON_CPU)
    assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "resumed" / "net.safetensors", tmp_path / "2" / "net.safetensors")


@needs_deepspeed
@pytest.mark.parametrize(
    ("script", "command"),
    [(train_word.SCRIPT, train_word.command), (control_nets.LLLITE.script, control_nets.LLLITE.arguments)],
    ids=["words", "lllite"],
)
def test_words_and_control_networks_learn_in_two_processes_what_they_learn_in_one(
    script: str, command: Callable[..., list[str]], tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    dataset = write_dataset(tmp_path, photos, batch_size=4)
    text = dataset.read_text().replace("shuffle_caption = true\n", "").replace("caption_tag_dropout_rate = 0.2\n", "")
    controls = f'conditioning_data_dir = "{(tmp_path / "images").as_posix()}"\n' if script == control_nets.LLLITE.script else ""
    dataset.write_text(text + controls)
    halved = tmp_path / "halved.toml"
    halved.write_text(dataset.read_text().replace("batch_size = 4", "batch_size = 2"))
    more = [*PLAIN, "--learning_rate", "5", "--max_train_epochs", "2", "--gradient_accumulation_steps", "2"]
    more += ["--output_name", "it"]
    zero = ["--deepspeed", "--offload_optimizer_device", "cpu"]
    for name, of, count, asked in (("one", dataset, 1, []), ("averaged", halved, 2, []), ("divided", halved, 2, zero)):
        args = command(tiny_checkpoint, of, tmp_path / name, *more, *asked)
        done = run_processes(args, script, count=count, more=ON_CPU)
        assert done.returncode == 0, done.stderr
    one, *others = (weights(tmp_path / name / "it.safetensors") for name in ("one", "averaged", "divided"))
    for theirs in others:
        for key, tensor in one.items():
            largest = 1e-4 * tensor.abs().max() + 1e-8  # what is added to every key alike learns from rounding errors alone
            assert (theirs[key] - tensor).abs().max() <= largest, key
