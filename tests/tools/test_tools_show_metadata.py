"""What `show_metadata` prints of files of every kind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.options.errors import UserError
from tools.show_metadata import main

ROOT = Path(__file__).resolve().parents[2]
METADATA = {
    "ss_steps": "100",
    "ss_datasets": '[{"resolution": [1024, 1024]}]',
    "modelspec.title": "Löwe 獅子",
    "ss_tag_frequency": '{"10_cat": {"cat": 3}}',
    "note": "[not JSON",
}


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3)}, path, METADATA)
    return path


def test_metadata_is_printed_sorted_with_json_unfolded(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfolded = {"ss_datasets": [{"resolution": [1024, 1024]}], "ss_tag_frequency": {"10_cat": {"cat": 3}}}
    expected = json.dumps(METADATA | unfolded, indent=4, sort_keys=True, ensure_ascii=False)
    assert shown(capsys, "--model", model) == expected + "\n"


def test_raw_prints_the_texts_of_the_file_as_sd_scripts_does(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(shown(capsys, "--model", model, "--raw")) == METADATA


def test_a_terminal_without_unicode_gets_escapes(model: Path) -> None:
    command = [sys.executable, "tools/show_metadata.py", "--model", str(model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["modelspec.title"] == METADATA["modelspec.title"]


def test_a_safetensors_file_is_read_without_torch_and_without_its_tensors(model: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tools.show_metadata import main\n"
        "main(['--model', sys.argv[1]])\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(model)], cwd=ROOT, check=False, capture_output=True).returncode == 0


def test_a_reader_that_hangs_up_is_no_mistake(model: Path) -> None:
    command = [sys.executable, "tools/show_metadata.py", "--model", str(model)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_checkpoint_tells_its_metadata_epoch_and_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"state_dict": {"w": torch.zeros(2)}, "epoch": 3, "global_step": 40, "metadata": {"ss_seed": "7"}}
    torch.save(content, tmp_path / "model.ckpt")
    assert json.loads(shown(capsys, "--model", tmp_path / "model.ckpt")) == {"epoch": "3", "global_step": "40", "ss_seed": "7"}


def test_files_without_metadata_or_of_another_kind_get_a_sentence_and_a_status(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    torch.save({"w": torch.zeros(1)}, tmp_path / "plain.pt")
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    for name, words in {
        "plain.safetensors": "has no metadata",
        "plain.pt": "has no metadata",
        "page.safetensors": "a web page",
        "gone.safetensors": "does not exist",
        "gone.ckpt": "does not exist",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            main(["--model", str(tmp_path / name)])
        assert error.value.exit_status == 1
    command = [sys.executable, "tools/show_metadata.py", "--model", str(tmp_path / "plain.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and "has no metadata" in done.stderr
