"""A script ends with a sentence and an exit status, and its messages go where the options say."""

import errno
import logging
import sys
import threading
import time

import pytest

from library.dataset.findings import Findings, Kind
from library.options import entry
from library.options.console import hold_messages, release_messages, set_up_logging
from library.options.entry import run_script
from library.options.errors import UsageError, UserError
from library.options.groups.console import ConsoleOptions


@pytest.fixture(autouse=True)
def untouched_root_logger(monkeypatch):
    """Put the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(entry, "_WAIT_FOR_FIRST", 0.01)
    yield
    root.handlers[:], root.level = handlers, level


def ended(main):
    with pytest.raises(SystemExit) as error:
        run_script(main)
    return error.value.code


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("model.safetensors is truncated."), 1, "model.safetensors is truncated.\n"),
        (UsageError(["--seed needs a value."]), 2, "--seed needs a value.\n"),
        (UsageError(["one.", "two."]), 2, "2 mistakes:\n- one.\n- two.\n"),
        (KeyboardInterrupt(), 130, "Stopped.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.png"),
            1,
            "The disk is full: a.png. Free some space and start again.\n",
        ),
    ],
)
def test_a_mistake_ends_with_its_text_and_status(error, status, text, capsys):
    assert ended(raising(error)) == status
    assert capsys.readouterr().err == text


def test_a_defect_shows_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(raising(ZeroDivisionError()))
    with pytest.raises(PermissionError):
        run_script(raising(PermissionError(errno.EACCES, "denied")))


def test_a_good_run_ends_with_0_and_gets_the_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--seed", "1"])
    seen = []
    assert ended(seen.append) == 0
    assert seen == [["--seed", "1"]]


def test_only_the_first_process_tells_about_the_command_line(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert ended(raising(UsageError(["wrong."]))) == 2
    assert capsys.readouterr().err == ""


def test_messages_before_the_options_are_known_go_where_the_options_say(tmp_path, capsys):
    hold_messages()
    logging.getLogger("library.early").warning("an odd key")
    set_up_logging(ConsoleOptions(console_log_file=str(tmp_path / "run.log"), console_log_level="WARNING"))
    logging.getLogger("library.late").info("not important enough")
    logging.getLogger("library.late").error("late")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["WARNING an odd key", "ERROR late"]
    assert capsys.readouterr().err == ""


def test_a_message_file_that_cannot_be_made_is_told_in_a_sentence(tmp_path):
    with pytest.raises(UsageError, match=r"--console_log_file .*none/run.log cannot be written \(No such file or directory\)"):
        set_up_logging(ConsoleOptions(console_log_file=str(tmp_path / "none" / "run.log")))


def test_only_the_first_process_has_the_message_file(monkeypatch, tmp_path, capsys):
    (tmp_path / "run.log").write_text("of the first\n")
    monkeypatch.setenv("RANK", "1")
    set_up_logging(ConsoleOptions(console_log_file=str(tmp_path / "run.log")))
    logging.getLogger("library").error("of the second")
    assert (tmp_path / "run.log").read_text() == "of the first\n"
    assert "of the second" in capsys.readouterr().err


def test_held_messages_are_shown_when_the_run_ends_early(capsys):
    hold_messages()
    logging.getLogger("library").warning("odd")
    release_messages()
    assert "WARNING odd" in capsys.readouterr().err


def test_simple_messages_go_to_standard_output(capsys):
    set_up_logging(ConsoleOptions(console_log_simple=True))
    logging.getLogger("library").info("hello")
    set_up_logging(ConsoleOptions(console_log_simple=True))
    logging.getLogger("library").info("again")
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in shown] == ["INFO hello", "INFO again"]


def test_other_processes_show_errors_only(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    set_up_logging(ConsoleOptions())
    logging.getLogger("library").warning("twice")
    logging.getLogger("library").error("broken")
    assert capsys.readouterr().err.count("\n") == 1


def test_handlers_of_others_stay(caplog):
    set_up_logging(ConsoleOptions())
    assert caplog.handler in logging.getLogger().handlers


@pytest.mark.parametrize(("rank", "lines"), [("0", 4), ("1", 0)])
def test_only_the_first_process_tells_what_is_wrong_with_a_dataset(rank, lines, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "7")  # of another machine
    findings = Findings()
    findings.error(Kind.NO_IMAGES, "pictures", "There are no images in pictures.")
    monkeypatch.setenv("LOCAL_RANK", rank)
    started = time.monotonic()
    assert ended(lambda argv: findings.raise_errors()) == 1
    assert capsys.readouterr().err.count("\n") == lines
    assert (time.monotonic() - started >= 0.01) == (lines == 0)  # a launcher would end the first process before it has told


def test_others_wait_for_the_first_process_until_it_has_told_and_no_longer(monkeypatch, tmp_path):
    monkeypatch.setattr(entry, "_WAIT_FOR_FIRST", 20.0)
    monkeypatch.setattr(entry.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    started = time.monotonic()
    waiting = threading.Thread(target=entry._wait_for_first)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert ended(raising(UsageError(["wrong."]))) == 2
    waiting.join(5)
    assert time.monotonic() - started < 5
    assert not list(tmp_path.iterdir())


def test_every_process_tells_what_it_may_be_alone_to_find(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert ended(raising(UserError("The disk is full."))) == 1
    assert capsys.readouterr().err == "The disk is full.\n"
