"""The file beside the output that tells what a run was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from library.dataset.dataset import Dataset
from library.diffusion.objective import DdpmObjective
from library.diffusion.schedule import NoiseSchedule
from library.options.groups.length import LengthOptions
from library.options.groups.logging import LoggingOptions
from library.options.groups.output import OutputOptions
from library.options.groups.state import StateOptions
from library.options.scripts import SdxlTrainNetworkOptions
from library.training.accelerator import DTypes
from library.training.events import EventLog, RunEnd
from library.training.identity import identity_of
from library.training.manifest import Manifest, run_facts
from library.training.outputs import RunLength
from library.training.position import Position
from library.training.saving import Saved
from library.training.setting import Setting, Trained, beside_output
from tests.dataset.dataset_samples import FakeFamily, config, make_image, section, subset


def setting(folder: Path, output_name: str | None = "net") -> Setting:
    options = SdxlTrainNetworkOptions(
        output=OutputOptions(output_dir=str(folder / "out"), output_name=output_name),
        logging=LoggingOptions(wandb_api_key="kkk"),
        length=LengthOptions(seed=7),
        state=StateOptions(resume="before"),
    )
    make_image(folder / "a.png")
    (folder / "a.txt").write_text("a picture\n")
    dtypes = DTypes(torch.float32, torch.float32, torch.float32, None)
    dataset = Dataset(config(section(subset(folder, num_repeats=3))), 7)
    length = RunLength.of(2, 1, 6, None)
    objective = DdpmObjective(NoiseSchedule.make(), False, options.noise, options.loss)
    return Setting(options, Accelerator(cpu=True), dtypes, 7, FakeFamily(), objective, dataset, 2, length, 1.7e9, EventLog())


def trained() -> Trained:
    group = {"params": [torch.zeros(2, 3), torch.zeros(4)], "lr": 1e-4}
    return Trained(None, [group], ["unet"], False, ".safetensors")  # type: ignore[arg-type]


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def run(path: Path, facts: dict[str, Any], *, continues: bool, steps: int) -> None:
    manifest = Manifest(path, facts, continues=continues)
    manifest.before_training(Position())
    for step in range(1, steps + 1):
        manifest.after_update(Position(1, step, step))
    manifest.saved(Saved(Path("net.safetensors"), "model", "final", Position(1, steps, steps)))
    manifest.ended(RunEnd("complete", None, 12.5))


def test_it_says_what_was_run_on_what_and_keeps_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["sdxl_train_network.py", "--seed", "7", "--wandb_api_key", "kkk"])
    own = setting(tmp_path)
    path = beside_output(own, "run.json")
    assert path == tmp_path / "out" / "net-run.json"
    Manifest(path, run_facts(own, trained(), Position(2, 1, 3), identity_of(own)), continues=False).before_training(
        Position(2, 1, 3)
    )
    written = read(path)
    assert written["arguments"] == ["--seed", "7", "--wandb_api_key", "***"]
    assert written["options"]["output_name"] == "net"
    assert written["options"]["unet_lr"] is None
    assert written["options"]["wandb_api_key"] == "***"
    assert written["seeds"] == {"seed": 7, "validation_seed": None}
    assert written["dataset"] | {"digest": "", "parts": ""} == {
        "digest": "", "parts": "", "images": 1, "uses_per_epoch": 3, "held_out": 0,
    }  # fmt: skip
    assert written["models"] == {"--pretrained_model_name_or_path": None, "--vae": None}
    assert len(bytes.fromhex(written["dataset"]["digest"])) == 16
    assert written["trained"] == [{"part": "unet", "parameters": 10, "learning_rate": 1e-4}]
    assert (written["start"], written["length"]["steps"]) == ({"step": 3, "epoch": 2, "batch": 1}, 6)
    assert torch.__version__.startswith(written["packages"]["torch"])
    assert written["hardware"]["device"] == "cpu"
    assert written["started_at"] == "2023-11-14T22:13:20+00:00"
    assert written["end"] is None


def test_runs_without_a_name_have_one_too(tmp_path: Path) -> None:
    assert beside_output(setting(tmp_path, output_name=None), "run.json").name == "last-run.json"


def test_the_end_is_added_and_a_resumed_run_keeps_those_before_it(tmp_path: Path) -> None:
    path = tmp_path / "net-run.json"
    run(path, {"name": "first"}, continues=False, steps=2)
    first = read(path)
    assert first["end"] | {"at": ""} == {"outcome": "complete", "message": None, "step": 2, "seconds": 12.5, "at": ""}
    assert first["saved"] == [{"step": 2, "what": "model", "path": "net.safetensors"}]
    run(path, {"name": "second"}, continues=True, steps=3)
    run(path, {"name": "third"}, continues=True, steps=4)
    assert [each["name"] for each in read(path)["earlier_runs"]] == ["first", "second"]
    run(path, {"name": "another"}, continues=False, steps=1)
    assert read(path)["earlier_runs"] == []


def test_a_manifest_that_is_no_manifest_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "net-run.json"
    path.write_text("[1]", encoding="utf-8")
    run(path, {"name": "first"}, continues=True, steps=2)
    assert read(path)["earlier_runs"] == []
    assert not caplog.records
    run(tmp_path / "net-run.json" / "below a file", {}, continues=False, steps=1)
    assert "could not be written" in caplog.text
