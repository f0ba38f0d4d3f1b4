"""Forecast the memory of the settings of a table that was measured with sd-scripts, beside its figures, without a GPU or weights.

    python tools/forecast_table.py benchmarks/results/forecast_table.json

The figures are those of the Russian page of sd-scripts' documentation (version 0.8.3): GB of a Python process at 1024². The page
says nothing of optimizer, precision and caches; here they are AdamW8bit or AdamW, bf16 computation, cached latents and cached text.
Each forecast is that of `--dry_run`: of a checkpoint of full size that has a header alone, and blank pictures. Rows that are in the
file already are left as they are.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the project's folder is not on the path

from library.files.atomic import atomic_write_text

Row = tuple[str, str, dict[int, float]]
ROWS: dict[str, Row] = {
    "R1": ("full fine-tune", "", {1: 38.5, 2: 44.0}),
    "R2": ("full fine-tune", "checkpointing", {1: 34.4, 2: 35.2, 8: 40.5}),
    "R3": ("LoRA 32", "", {1: 17.4, 4: 47.7}),
    "R4": ("LoRA 32", "bf16", {1: 16.7}),
    "R5": ("LoRA 32", "checkpointing", {1: 9.4, 2: 13.1}),
    "R6": ("LoRA 32", "bf16 checkpointing", {1: 9.1}),
    "R7": ("LoRA 32", "fp8 checkpointing", {1: 6.4}),
    "R8": ("LoRA 128", "", {1: 20.5, 3: 41.7}),
    "R9": ("LoRA 128", "bf16", {1: 18.3, 4: 47.8}),
    "R10": ("LoRA 128", "checkpointing", {1: 12.0}),
    "R11": ("LoRA 128", "bf16 checkpointing", {1: 10.3, 4: 15.0}),
    "R12": ("LoRA 128", "fp8 checkpointing", {1: 9.9}),
    "R13": ("LoCon 64+32", "", {1: 18.6, 2: 30.4}),
    "R14": ("LoCon 64+32", "checkpointing", {1: 10.6}),
    "R15": ("LoCon 64+32", "bf16 checkpointing", {1: 9.7}),
    "R16": ("LoCon 64+32", "fp8 checkpointing", {1: 7.2}),
}
"""What is trained, how, and GB by batch size."""

FUSED = "--fused_backward_pass --max_grad_norm 0"
ADAFACTOR = f"{FUSED} --optimizer_args relative_step=False scale_parameter=False"
ADDED: Sequence[tuple[str, int, str, str]] = (
    ("R1", 1, "Adafactor", ADAFACTOR),
    ("R1", 2, "Adafactor", ADAFACTOR),
    ("R2", 1, "Adafactor", ADAFACTOR),
    ("R2", 2, "AdamW8bit", FUSED),
    ("R2", 8, "AdamW8bit", FUSED),
    ("R10", 1, "AdamW8bit", FUSED),
    ("R10", 1, "AdamW8bit", "--optimizer_states host"),
    ("R11", 1, "AdamW8bit", FUSED),
    ("R11", 1, "AdamW8bit", "--optimizer_states host"),
)
"""Row, batch size, optimizer, and options that take less memory: what helps where the plain row misses the target."""

FLAGS = {"checkpointing": "--gradient_checkpointing", "bf16": "--full_bf16", "fp8": "--fp8_base"}
TARGET = 0.7
"""Most of the table's figure that a forecast should be."""


def flags(row: Row, optimizer: str) -> list[str]:
    """Return the options of a row."""
    what, how, _ = row
    words = ["--mixed_precision", "bf16", "--cache_latents", "--cache_text_encoder_outputs", "--optimizer_type", optimizer]
    words += [FLAGS[each] for each in how.split()]
    if what == "full fine-tune":
        return words
    kind, _, ranks = what.partition(" ")
    rank, _, conv = ranks.partition("+")
    words += ["--network_module", "networks.lora", "--network_train_unet_only", "--network_dim", rank]
    return [*words, "--network_args", f"conv_dim={conv}"] if kind == "LoCon" else words


def cells(done: Sequence[dict[str, Any]]) -> Iterator[tuple[str, int, str, str]]:
    """Yield row, batch size, optimizer and added options of what is not done; the smallest batches come first."""
    have = {(each["row"], each["batch_size"], each["optimizer"], each["added"]) for each in done}
    rows = {
        optimizer: [
            (name, size, optimizer, "") for size in (1, 2, 3, 4, 8) for name, (_, _, figures) in ROWS.items() if size in figures
        ]
        for optimizer in ("AdamW8bit", "AdamW")
    }
    yield from (cell for cell in (*rows["AdamW8bit"], *ADDED, *rows["AdamW"]) if cell not in have)


def main(argv: Sequence[str]) -> None:
    """Forecast cell after cell, and write the file after each."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__)
        return
    path = Path(argv[0])
    done = json.loads(path.read_text())["rows"] if path.exists() else []
    from tools.forecast_row import forecast_gb, make_files

    with tempfile.TemporaryDirectory() as folder:
        checkpoint, images = make_files(Path(folder))
        for name, size, optimizer, added in cells(done):
            words = [*flags(ROWS[name], optimizer), *added.split()]
            figure = ROWS[name][2][size]
            gb = forecast_gb(ROWS[name][0] == "full fine-tune", words, checkpoint, images, size)
            ratio = round(gb / figure, 3)
            done.append(
                {"row": name, "batch_size": size, "optimizer": optimizer, "added": added, "flags": words}
                | {"table_gb": figure, "forecast_gb": gb, "ratio": ratio, "reaches_target": ratio <= TARGET}
            )
            print(
                f"{name} ({' '.join(ROWS[name][:2])}) batch {size} {optimizer} {added}: {gb:.2f} of {figure} GB ({ratio:.0%})",
                flush=True,
            )
            facts = {"command": f"python tools/forecast_table.py {argv[0]}", "target": TARGET, "rows": done}
            atomic_write_text(path, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
