"""What the tests of training commands share: a small dataset, command lines, and ways to run them."""

import itertools
import multiprocessing
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "sdxl_train_network.py")
FINETUNE = str(ROOT / "sdxl_train.py")

DATASET = """
[general]
resolution = 64
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 32
caption_extension = ".txt"
shuffle_caption = true
caption_tag_dropout_rate = 0.2
flip_aug = true

[[datasets]]
batch_size = {batch_size}

[[datasets.subsets]]
image_dir = "{images}"
num_repeats = {repeats}
"""


def write_dataset(folder: Path, photos: Path, *, batch_size: int = 2, repeats: int = 1, count: int = 5) -> Path:
    """Copy some of the photographs, small, and describe them in a dataset file."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for path in sorted(photos.glob("*.jpg"))[:count]:
        with Image.open(path) as image:
            image.resize((image.width // 4, image.height // 4)).save(images / path.name)
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        (images / path.name).with_suffix(".txt").write_text(caption.strip() + ", photo, outdoors, bright", encoding="utf-8")
    config = folder / "dataset.toml"
    config.write_text(DATASET.format(batch_size=batch_size, repeats=repeats, images=images.as_posix()), encoding="utf-8")
    return config


def write_dataset_with_controls(folder: Path, photos: Path) -> Path:
    """Describe three photographs, with their negatives in the folder `controls` as what is to be followed."""
    config = write_dataset(folder, photos, count=3)
    controls = folder / "controls"
    controls.mkdir()
    for path in (folder / "images").glob("*.jpg"):
        with Image.open(path) as image:
            ImageOps.invert(image.convert("RGB")).save(controls / f"{path.stem}.png")
    text = config.read_text(encoding="utf-8")
    text = text.replace("caption_tag_dropout_rate = 0.2\n", "").replace("shuffle_caption = true\n", "")
    config.write_text(f'{text}conditioning_data_dir = "{controls.as_posix()}"\n', encoding="utf-8")
    return config


def arguments(checkpoint: Path, dataset: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of a small run; later ones win over earlier ones."""
    return [
        "--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(dataset),
        "--output_dir", str(output), "--output_name", "net", "--network_module", "networks.lora", "--network_dim", "4",
        "--network_dropout", "0.1", "--learning_rate", "1e-3", "--max_train_steps", "6", "--seed", "11",
        "--max_data_loader_n_workers", "0", *more,
    ]  # fmt: skip


def finetune_arguments(checkpoint: Path, dataset: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of a small run of `sdxl_train.py`; later ones win over earlier ones."""
    return [
        "--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(dataset),
        "--output_dir", str(output), "--output_name", "model", "--learning_rate", "1e-3", "--max_train_steps", "4", "--seed", "11",
        "--max_data_loader_n_workers", "0", *more,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """Return an environment in which runs repeat bit for bit: the number of threads decides the order of sums."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Blow:
    """A signal that a run is sent in the middle of its work, at the same place every time."""

    number: int
    batch: int
    """Batches trained on before it comes, by the process that it is sent to."""
    rank: int = 0
    """Of that process."""


def run_command(
    args: Sequence[str],
    launcher: Sequence[str] = (),
    script: str = SCRIPT,
    *,
    blow: Blow | None = None,
    typed: str = "",
    prepare: Callable[[], object] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, in a process of its own, from the project's folder.

    Without a launcher the process is forked from one that has the large libraries loaded, which otherwise take longer than what is
    tested; launchers start from nothing, as a person does.
    """
    command = [sys.executable, *launcher, script, *args]
    if launcher or sys.platform != "linux":
        return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False)
    return run_processes(args, script, count=1, blow=blow, typed=typed, prepare=prepare)


def environment_launched(config: Path) -> dict[str, str]:
    """Return what `accelerate launch` sets in the environment of a script, given one of its configuration files."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(config), "--main_process_port", "0", "script.py"]
    arguments = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    arguments.deepspeed_fields_from_accelerate_config = ""
    made = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    return {name: value for name, value in made.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def run_processes(
    args: Sequence[str],
    script: str = SCRIPT,
    *,
    count: int = 2,
    more: Mapping[str, str] | None = None,
    blow: Blow | None = None,
    typed: str = "",
    prepare: Callable[[], object] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end in several processes that train together, started as a launcher starts them but from warm ones.

    Args:
        args: of the script.
        script: its path.
        count: of processes.
        more: environment variables that a launcher would set besides.
        blow: that one of them is dealt.
        typed: what each reads from standard input.
        prepare: called in each before it begins; has to be picklable.

    Returns:
        What the first process said, and the largest exit status, or the number of the signal that ended it.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        (Path(folder) / "in").write_text(typed)
        started = []
        for rank in range(count):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            variables = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if count > 1 else {}
            files = [str(Path(folder) / name) for name in ("in", f"out{rank}", f"err{rank}")]
            own_blow = blow if blow is not None and blow.rank == rank else None
            process = warm_processes().Process(
                target=_run_script, args=(script, list(args), files, {**variables, **(more or {})}, own_blow, prepare)
            )
            process.start()
            started.append(process)
        for process in started:
            process.join()
        codes = [abs(process.exitcode or 0) for process in started]
        said = [[(Path(folder) / f"{name}{rank}").read_text(errors="replace") for name in ("out", "err")] for rank in range(count)]
    complaints = "".join(err for code, (_, err) in zip(codes[1:], said[1:], strict=True) if code)
    return subprocess.CompletedProcess([script, *args], max(codes), said[0][0], said[0][1] + complaints)


def run_killed(args: Sequence[str], script: str = SCRIPT, *, when: Callable[[], bool]) -> None:
    """Start a script and end it without notice (SIGKILL) as soon as a condition holds."""
    process = warm_processes().Process(target=_run_script, args=(script, list(args), [os.devnull] * 3, {}))
    process.start()
    end = time.monotonic() + 120
    while not when():
        assert process.is_alive() and time.monotonic() < end, "what the kill waits for did not come"
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@cache
def warm_processes() -> ForkServerContext:
    """Return what forks processes that have the large libraries loaded and compute in one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cli.loaded_before"])
    before = dict(os.environ)
    os.environ.update(environment() | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"})
    try:
        context.Process(target=_nothing).start()  # starts the server, which keeps this environment
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _nothing() -> None:
    pass


def _run_script(
    script: str,
    args: list[str],
    files: Sequence[str],
    variables: Mapping[str, str],
    blow: Blow | None = None,
    prepare: Callable[[], object] | None = None,
) -> None:
    """Run a script as the main program, with its standard input and output in files."""
    for descriptor, path in enumerate(files):
        with open(path, "wb" if descriptor else "rb") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(ROOT)
    os.environ.update(variables)
    sys.argv = [script, *args]
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # it lives as long as the process
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    if blow is not None:
        _deal(blow)
    if prepare is not None:
        prepare()
    runpy.run_path(script, run_name="__main__")


def _deal(blow: Blow) -> None:
    """Send this process the signal before the batch it is meant for."""
    from library.training import loop

    count, train_on = itertools.count(), loop.accumulate_gradient

    def dealt(*args: Any, **more: Any) -> Any:
        if next(count) == blow.batch:
            os.kill(os.getpid(), blow.number)
        return train_on(*args, **more)

    loop.accumulate_gradient = dealt


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file."""
    return dict(load_file(path))


def assert_same_bits(one: Path, other: Path) -> None:
    """Hold that two files have the same tensors, bit for bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def resume_arguments(said: str) -> list[str]:
    """Return the arguments of the command that a stopped run told to continue with."""
    line = next(line for line in said.splitlines() if "--resume" in line and "--pretrained_model_name_or_path" in line)
    words = shlex.split(line)
    return words[words.index("--pretrained_model_name_or_path") :]
