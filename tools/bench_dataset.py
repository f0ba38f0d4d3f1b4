"""Measure what a dataset costs before training begins: time and memory an image, at growing numbers of images.

    python tools/bench_dataset.py --json dataset.json
    python tools/bench_dataset.py --images 1000 --without_files 10000 --repeat 1      # a few seconds

Small JPEGs with captions are made in a temporary folder, where they lie in the page cache, and each number is measured in processes
of its own: the first start, which reads every header and caption; the second, which finds everything remembered; the checks of what
is found, without tokenizer; the facts that are recorded in trained files; the plan of an epoch. For the numbers of
`--without_files`, names, headers and captions are made up instead and go through the same database, so that growth is seen where
making the files would take too long. What is told is the median of `--repeat` measurements.
"""

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from library.dataset.folder_files import FolderFiles, Notes
    from library.dataset.index import Section
    from library.options.dataset_config import DatasetConfig

_TEMPLATES = 64
_WORDS = ("outdoors", "evening light", "1girl", "looking at viewer", "photograph", "blue sky", "from above", "smile", "a cat")
_COLUMNS = {
    "first": "first start",
    "second": "second start",
    "check": "checks",
    "facts": "facts recorded",
    "plan": "plan of an epoch",
    "memory": "memory held",
    "peak": "peak memory",
}


def main(argv: Sequence[str]) -> None:
    """Measure, print a table, and write the JSON where asked."""
    arguments = command_line().parse_args(argv)
    if arguments.one:
        kind, folder = arguments.one
        sys.stdout.write(json.dumps(measured(kind, folder, arguments.images[0])) + "\n")
        return
    rows = []
    for count, has_files in [(n, True) for n in arguments.images] + [(n, False) for n in arguments.without_files]:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            rows.append(measure_count(folder, count, has_files, arguments.repeat))
        sys.stdout.write(table(rows[-1:], with_head=len(rows) == 1))
        sys.stdout.flush()
    report = {"command": ["tools/bench_dataset.py", *argv], "machine": machine(), "results": rows}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="*", default=[10_000, 100_000], help="numbers of images to make files for")
    parser.add_argument("--without_files", type=int, nargs="*", default=[1_000_000], help="numbers of images to make up")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each number (3)")
    parser.add_argument("--folder", help="where to make the temporary folder (the system's)")
    parser.add_argument("--json", help="file to write all measurements to")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    return parser


def measure_count(folder: str, count: int, has_files: bool, repeat: int) -> dict[str, Any]:
    """Return the medians for one number of images, and all single measurements."""
    if has_files:
        make_files(folder, count)
    kinds = ("first", "second") if has_files else ("first_made_up", "second_made_up")
    runs = [{kind.split("_")[0]: in_own_process(kind, folder, count) for kind in kinds} for _ in range(repeat)]

    def median(run: str, value: str) -> float:
        return float(statistics.median(single[run][value] for single in runs))

    return {
        "images": count,
        "files": has_files,
        "first_us": median("first", "seconds") / count * 1e6,
        "first_cpu_us": median("first", "cpu_seconds") / count * 1e6,
        "second_us": median("second", "seconds") / count * 1e6,
        "second_cpu_us": median("second", "cpu_seconds") / count * 1e6,
        "check_us": median("second", "check_seconds") / count * 1e6,
        "check_cpu_us": median("second", "check_cpu_seconds") / count * 1e6,
        "facts_us": median("second", "facts_seconds") / count * 1e6,
        "facts_cpu_us": median("second", "facts_cpu_seconds") / count * 1e6,
        "plan_us": median("second", "plan_seconds") / count * 1e6,
        "memory_bytes": median("second", "held_bytes") / count,
        "peak_bytes": median("second", "peak_bytes") / count,
        "runs": runs,
    }


def in_own_process(kind: str, folder: str, count: int) -> dict[str, Any]:
    """Measure in a process that has nothing else in memory."""
    command = [sys.executable, __file__, "--one", kind, folder, "--images", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measured(kind: str, folder: str, count: int) -> dict[str, Any]:
    """Index a folder and plan an epoch.

    Args:
        kind: `first` or `second` start, or either of them `_made_up`, without files.
        folder: of the images, or of the database alone.
        count: images there are.

    Returns:
        Seconds of the clock and of the processor, for the index and for the plan; bytes held afterwards beyond names and captions,
        and the peak meanwhile.
    """
    from library.dataset.dataset import uses_by_bucket
    from library.dataset.folder_files import FolderFiles
    from library.dataset.index import build_index
    from library.dataset.index_store import STORE_NAME
    from library.dataset.plan import plan_epoch

    store = Path(folder, STORE_NAME)
    if kind.startswith("first"):
        store.unlink(missing_ok=True)
    config = configured(folder)
    open_folder: Callable[[str], FolderFiles] = FolderFiles if not kind.endswith("made_up") else made_up_folder(count)
    gc.collect()
    before, seconds, cpu = _memory(), time.perf_counter(), time.process_time()
    sections = build_index(config, open_folder=open_folder)
    seconds, cpu = time.perf_counter() - seconds, time.process_time() - cpu
    gc.collect()
    held, peak = _memory() - before - _text_bytes(sections), _peak_memory() - before
    start = time.perf_counter()
    groups = uses_by_bucket([section.items for section in sections], start=0)
    plan = plan_epoch(list(groups.values()), [1] * len(groups), seed=0, epoch=1)
    plan_seconds = time.perf_counter() - start
    if len(plan.batches) != count:
        raise RuntimeError(f"{len(plan.batches)} images were planned, not {count}")
    start_up = {"seconds": seconds, "cpu_seconds": cpu, "plan_seconds": plan_seconds, "held_bytes": held, "peak_bytes": peak}
    return start_up | measured_checks(config, sections)


def measured_checks(config: "DatasetConfig", sections: "tuple[Section, ...]") -> dict[str, Any]:
    """Return the seconds of the pre-flight, with a tokenizer that costs nothing, and of the facts for the metadata."""
    from library.dataset import dataset as module
    from library.dataset.facts import metadata_facts
    from library.dataset.findings import Findings
    from library.dataset.preflight import Limits, check_dataset

    found: dict[str, Any] = {}
    with mock.patch.object(module, "build_index", return_value=sections):
        dataset = module.Dataset(config, 0, Findings())
    limits = Limits(lambda texts: [1] * len(texts), 75)
    jobs: dict[str, Callable[[], object]] = {
        "check": lambda: check_dataset(dataset, Findings(), limits),
        "facts": lambda: metadata_facts(dataset),
    }
    for name, job in jobs.items():
        seconds, cpu = time.perf_counter(), time.process_time()
        job()
        found |= {f"{name}_seconds": time.perf_counter() - seconds, f"{name}_cpu_seconds": time.process_time() - cpu}
    return found


def configured(folder: str) -> "DatasetConfig":
    """Return one dataset of one folder, with buckets."""
    from library.options.dataset_config import load_dataset_config
    from library.options.groups.cache import CacheOptions
    from library.options.groups.caption import CaptionTextOptions
    from library.options.groups.dataset import DatasetOptions
    from library.options.groups.image import ImageOptions

    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "dataset.json")
        subset = {"image_dir": folder, "caption_extension": ".txt"}
        dataset = {"resolution": 1024, "enable_bucket": True, "max_bucket_reso": 2048, "subsets": [subset]}
        file.write_text(json.dumps({"datasets": [dataset]}), encoding="utf-8")
        return load_dataset_config(DatasetOptions(dataset_config=file), CaptionTextOptions(), ImageOptions(), CacheOptions())


def make_files(folder: str, count: int) -> None:
    """Write small JPEGs of many sizes, half of them with EXIF data, and a caption for each."""
    from PIL import Image

    exif = Image.Exif()
    exif[274] = 1
    templates = []
    for number in range(_TEMPLATES):
        buffer = BytesIO()
        picture = Image.effect_noise((48 + number, 112 - number), 40).convert("RGB")
        picture.save(buffer, "JPEG", quality=60, exif=exif if number % 2 else b"")
        templates.append(buffer.getvalue())
    for number in range(count):
        stem = os.path.join(folder, f"{number:07}")
        with open(stem + ".jpg", "wb") as image, open(stem + ".txt", "w", encoding="utf-8") as text:
            image.write(templates[number % _TEMPLATES])
            text.write(_caption(number))


def made_up_folder(count: int) -> "Callable[[str], FolderFiles]":
    """Return what opens a folder as if it had so many images; what is found out of them goes through its database all the same."""
    from library.dataset.folder_files import FolderFiles
    from library.dataset.index_store import packed_facts

    class MadeUpFolder(FolderFiles):
        """Images that are nowhere."""

        def __init__(self, folder: str) -> None:
            super().__init__(folder)
            self.images = [f"{number:07}.jpg" for number in range(count)]
            self.stems = [name[:-4] for name in self.images]
            self.names = frozenset([*self.images, *(f"{number:07}.txt" for number in range(count))])

        def image_facts(
            self, names: Sequence[str], problems: dict[str, str], noted: "Notes[int] | None" = None
        ) -> list[int | None]:
            """Take what is remembered; else make it up and remember it."""
            known = {row[0]: row[3] for row in self.store.images()}
            if not known:
                sizes = random.Random(0)
                known = {name: packed_facts(sizes.randint(500, 2000), sizes.randint(500, 2000), 1, 0) for name in names}
                self.store.save(images=[(name, 1, 1, fact) for name, fact in known.items()])
            return [known[name] for name in names]

        def caption_texts(
            self, names: Sequence[str], problems: dict[str, str], noted: "Notes[str] | None" = None
        ) -> list[str | None]:
            """Take what is remembered; else make it up and remember it."""
            known = {row[0]: row[3] for row in self.store.captions()}
            if not known:
                known = {name: _caption(number) for number, name in enumerate(names)}
                self.store.save(captions=[(name, 1, 1, text) for name, text in known.items()])
            return [known[name] for name in names]

    return MadeUpFolder


def table(rows: Sequence[dict[str, Any]], *, with_head: bool) -> str:
    """Return the results for people, a line for each number of images."""
    lines = []
    if with_head:
        lines.append("Microseconds an image (of the processor, in brackets); bytes an image beyond name and caption.")
        lines.append(f"{'images':>10}" + "".join(f"{title:>20}" for title in _COLUMNS.values()))
    for row in rows:
        cells = [
            f"{row['first_us']:.1f} ({row['first_cpu_us']:.1f})",
            f"{row['second_us']:.1f} ({row['second_cpu_us']:.1f})",
            f"{row['check_us']:.1f} ({row['check_cpu_us']:.1f})",
            f"{row['facts_us']:.1f} ({row['facts_cpu_us']:.1f})",
            f"{row['plan_us']:.2f}",
            f"{row['memory_bytes']:.0f}",
            f"{row['peak_bytes']:.0f}",
        ]
        note = "" if row["files"] else "   made up, without files"
        lines.append(f"{row['images']:>10}" + "".join(f"{cell:>20}" for cell in cells) + note)
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """Describe what the figures were measured on."""
    return {"system": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()}


def _caption(number: int) -> str:
    return f"a picture with the number {number}, {_WORDS[number % 9]}, {_WORDS[number % 7]}, {_WORDS[number % 5]}\n"


def _text_bytes(sections: "Sequence[Section]") -> int:
    return sum(len(os.path.basename(item.path)) + len(item.caption) for section in sections for item in section.items)


def _memory() -> int:
    """Return the bytes of this process's own memory, as far as the system tells (Linux)."""
    return _of_status("RssAnon")


def _peak_memory() -> int:
    return _of_status("VmHWM") - _of_status("RssFile") - _of_status("RssShmem")


def _of_status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    from library.options.entry import run_script

    run_script(main)
