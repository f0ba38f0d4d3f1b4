"""Write the report on a dataset: a page for people, and the same facts for programs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from library.dataset.preflight import Checked
from library.dataset.report_facts import Facts, report_facts
from library.dataset.report_page import report_page
from library.dataset.thumbnails import thumbnails
from library.files.atomic import atomic_write_text

PAGE, DATA = "dataset_report.html", "dataset_report.json"
_PICTURES = 24
"""Small pictures in each gallery."""


def write_report(folder: Path, checked: Checked, lengths: Mapping[str, int], caches: Sequence[Facts] = ()) -> Path:
    """Write `dataset_report.html` and `dataset_report.json`, in place of earlier ones.

    Args:
        folder: is made where it does not exist.
        checked: the dataset.
        lengths: of the run: epochs, updates and the like, by name.
        caches: what is cached already, where anything is to be.

    Returns:
        The page.

    Raises:
        UserError: the folder cannot be written to.
    """
    facts = report_facts(checked, lengths) | {"caches": list(caches)}
    enlarged = _pictures(checked, facts["enlarged"], shows_crop=False)
    cropped = _pictures(checked, facts["cropped"], shows_crop=True)
    atomic_write_text(folder / DATA, json.dumps(facts, indent=2))
    atomic_write_text(folder / PAGE, report_page(facts, enlarged, cropped))
    return folder / PAGE


def _pictures(checked: Checked, group: Facts, *, shows_crop: bool) -> dict[int, str | None]:
    numbers = [entry["number"] for entry in group["listed"][:_PICTURES]]
    items = [checked.dataset.items[number] for number in numbers]
    return dict(zip(numbers, thumbnails(items, shows_crop=shows_crop), strict=True))
