"""The one list of everything that is wrong or odd."""

import pytest

from library.dataset.findings import Findings, Kind, Severity
from library.options.errors import UserError


def test_nothing_found_is_nothing_said() -> None:
    findings = Findings()
    findings.raise_errors()
    assert not findings.has_errors
    assert findings.warning_text() == ""


def test_warnings_alone_do_not_stop_a_run() -> None:
    findings = Findings()
    findings.warning(Kind.ANIMATED, "a.webp", "a.webp is animated.")
    findings.raise_errors()
    assert findings.warning_text().splitlines()[1:] == [
        "  Animated images: 1. Only the first frame is used.",
        "    a.webp is animated.",
    ]


def test_errors_come_first_the_worst_kind_before_the_others_and_warnings_apart() -> None:
    findings = Findings()
    findings.warning(Kind.ANIMATED, "a.webp", "a.webp is animated.")
    findings.error(Kind.UNREADABLE_CAPTION, "b.txt", "b.txt is empty.")
    findings.error(Kind.UNREADABLE_IMAGE, "c.png", "c.png is empty.")
    with pytest.raises(UserError) as told:
        findings.raise_errors()
    assert told.value.exit_status == 1
    assert str(told.value).splitlines() == [
        "The dataset has 2 errors:",
        "  Images that cannot be read: 1. Repair or remove them.",
        "    c.png is empty.",
        "  Captions that cannot be read: 1.",
        "    b.txt is empty.",
        "Besides, this may not be meant:",
        "  Animated images: 1. Only the first frame is used.",
        "    a.webp is animated.",
        "Repair these and start again.",
    ]


def test_many_of_a_kind_are_counted_and_a_few_shown() -> None:
    findings = Findings()
    for number in range(2000):
        findings.error(Kind.UNREADABLE_IMAGE, f"{number}.png", f"{number}.png is empty.")
    lines = findings.lines(Severity.ERROR)
    assert lines[0].startswith("Images that cannot be read: 2000.")
    assert len(lines) == 12
    assert lines[-1] == "  and 1990 more"


def test_a_sentence_about_several_files_counts_them_all() -> None:
    findings = Findings()
    findings.warning(Kind.NO_CAPTION, "d", "3 of 5 images in d have no .txt file.", count=3, files=["a", "b", "c"])
    assert findings.total(Severity.WARNING) == 3
    assert findings.lines(Severity.WARNING)[0].startswith("Images without a caption: 3.")
    assert "more" not in findings.lines(Severity.WARNING)[-1]


def test_the_same_thing_found_twice_counts_once() -> None:
    findings = Findings()
    for _ in range(2):
        findings.error(Kind.UNREADABLE_IMAGE, "a.png", "a.png is empty.")
    assert findings.total(Severity.ERROR) == 1
