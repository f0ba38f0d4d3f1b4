"""start.py: set-up is done once, failures are sentences, exit statuses are honest. No package is installed here."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import start

SOURCE = Path(start.__file__)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with requirement files and nothing else."""
    for name in ("requirements.txt", "requirements-dev.txt", "constraints.txt"):
        (tmp_path / name).write_text("somepackage\n")
    monkeypatch.setattr(start, "ROOT", tmp_path)
    return tmp_path


def fake_environment(folder: Path, install_status: int = 0, missing: bool = True) -> tuple[Path, Path]:
    """A virtual environment whose python only notes what it was asked; returns it and its notes."""
    log = folder / "calls.txt"
    python = folder / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    answer = "Would install somepackage-1" if missing else "Requirement already satisfied"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *--dry-run*) echo "{answer}"; exit 0;; esac\nexit {install_status}\n'
    )
    python.chmod(0o755)
    return folder / "env", log


def installs(log: Path) -> list[str]:
    """The real pip installs among the calls noted."""
    calls = log.read_text().splitlines() if log.exists() else []
    return [call for call in calls if "pip install" in call and "--dry-run" not in call]


def test_an_old_python_is_refused_with_both_versions_in_the_sentence() -> None:
    with pytest.raises(start.SetupError, match=r"needs Python 3\.11 or later, and this is Python 3\.9"):
        start.require_python((3, 9))
    start.require_python((3, 11))
    start.require_python((4, 0))


def test_the_script_can_be_read_by_an_old_python_and_imports_the_standard_library_only() -> None:
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 8))
    imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names


@pytest.mark.parametrize("arguments", [["demi"], ["demo", "--fast"], []])
def test_a_wrong_command_line_ends_with_status_2_and_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        start.main(arguments)
    assert stop.value.code == 2
    assert "usage: start.py" in capsys.readouterr().err


def test_words_after_test_go_to_pytest() -> None:
    assert start.read_command_line(["test", "tests/files", "-x", "-k", "name"]) == ("test", ["tests/files", "-x", "-k", "name"])


def test_the_active_environment_is_found_by_prefix_or_by_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, _ = fake_environment(tmp_path)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert start.active_environment() is None
    monkeypatch.setenv("VIRTUAL_ENV", str(environment))
    assert start.active_environment() == environment
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "deleted"))
    assert start.active_environment() is None
    monkeypatch.setattr(sys, "prefix", "/some/environment")
    assert start.active_environment() == Path("/some/environment")


def test_packages_are_installed_once_until_a_requirement_file_changes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment, log = fake_environment(project)
    start.install(environment, "requirements.txt", own=True)
    assert len(installs(log)) == 1
    assert "-r requirements.txt -c constraints.txt" in installs(log)[0]
    capsys.readouterr()
    start.install(environment, "requirements.txt", own=True)
    assert len(installs(log)) == 1
    assert "are installed" in capsys.readouterr().out
    (project / "constraints.txt").write_text("somepackage==2\n")
    start.install(environment, "requirements.txt", own=True)
    assert len(installs(log)) == 2


def test_a_persons_environment_that_has_everything_is_left_alone(project: Path) -> None:
    environment, log = fake_environment(project, missing=False)
    start.install(environment, "requirements.txt", own=False)
    assert installs(log) == []


def test_our_own_environment_gets_the_tested_versions_even_where_others_would_do(project: Path) -> None:
    environment, log = fake_environment(project, missing=False)
    start.install(environment, "requirements.txt", own=True)
    assert len(installs(log)) == 1


def test_a_persons_environment_that_lacks_something_gets_it(project: Path) -> None:
    environment, log = fake_environment(project, missing=True)
    start.install(environment, "requirements.txt", own=False)
    assert len(installs(log)) == 1


def test_a_failing_pip_is_a_sentence_and_is_tried_again(project: Path) -> None:
    environment, log = fake_environment(project, install_status=7)
    for attempt in (1, 2):
        with pytest.raises(start.SetupError, match=r"exit status 7.*What pip says is above"):
            start.install(environment, "requirements.txt", own=True)
        assert len(installs(log)) == attempt


@pytest.mark.parametrize(("failing", "status"), [(None, 0), ("mypy", 1), ("ruff check", 1), ("import-linter", 1), ("pytest", 1)])
def test_the_exit_status_is_0_only_when_everything_passed(
    failing: str | None, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = Path("env/bin/python")
    broken = start.checks(python).get(failing or "", ["-m", "pytest"] if failing else ["nothing"])
    ran: list[list[str]] = []

    def run(command: list[str]) -> int:
        ran.append(command)
        return int(all(word in command for word in broken))

    monkeypatch.setattr(start, "set_up", lambda _requirements: python)
    monkeypatch.setattr(start, "run", run)
    assert start.test(["tests/files"]) == status
    assert len(ran) == 5, "a failing check must not hide what the others say"
    assert "pytest" in ran[-1]
    assert ran[-1][-1] == "tests/files"
    if failing in start.checks(python):
        assert f"failed: {failing}" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_in_work_and_leaves_nothing_running(tmp_path: Path, sent: int, status: int) -> None:
    marker = tmp_path / "child.pid"
    child = f"import os, time; open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    driver = (
        f"import sys, start\nstart.demo = lambda: start.run_step('Wait', [sys.executable, '-c', {child!r}], '')\n"
        "sys.exit(start.main(['demo']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver], cwd=SOURCE.parent, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 20
    while not (marker.exists() and marker.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does
    else:
        process.send_signal(sent)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == status
    assert "Traceback" not in output.decode()
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


def test_commands_wait_asleep_and_offline_unless_the_person_chose_how_threads_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert start.child_environment()["OMP_WAIT_POLICY"] == "PASSIVE"
    assert start.child_environment()["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert start.child_environment()["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_step_that_fails_names_itself_its_status_and_what_to_do() -> None:
    with pytest.raises(start.SetupError, match=r"“Do it” stopped with exit status 3\. Try again\."):
        start.run_step("Do it", [sys.executable, "-c", "raise SystemExit(3)"], "Try again.")


def test_the_demo_runs_the_steps_in_order_and_prints_both_results(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, log = fake_environment(project)
    said: list[str] = []
    monkeypatch.setattr(start, "set_up", lambda _requirements: start.python_in(environment))
    monkeypatch.setattr(start, "say", said.append)
    start.demo()
    scripts = [line.split()[0] for line in log.read_text().splitlines()]
    assert scripts == [
        "sdxl_gen_img.py",
        "sdxl_train_network.py",
        "sdxl_gen_img.py",
        "tools/make_grid.py",
        "examples/toy/evaluate.py",
    ]
    assert str(project / "demo_output" / "toy_lora.safetensors") in said[-1]
    assert str(project / "demo_output" / "before_after.png") in said[-1]
