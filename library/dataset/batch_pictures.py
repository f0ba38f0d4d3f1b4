"""Write the first batches of a run as pictures, with everything else that training is told of them."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from library.dataset.batch import Batch
from library.dataset.contact_sheet import contact_sheet
from library.dataset.dataset import Dataset, Draws
from library.dataset.loader import Loader
from library.files.atomic import atomic_write, atomic_write_text

MOST_BATCHES = 12
TEXTS = "batches.jsonl"
_SHEETS = "batch-{:03d}.png"


def write_batches(folder: Path, dataset: Dataset, *, num_processes: int = 1, accumulation: int = 1, total_updates: int = 0) -> int:
    """Write the first batches of the first epoch as the first process sees them: resized, cropped, mirrored, with colours changed.

    A sheet `batch-001.png` and so on shows each batch, every image with its mask and control image beside it;
    `batches.jsonl` has a line for each image. Sheets of an earlier time go.

    Args:
        folder: is made where it does not exist.
        dataset: without caches.
        num_processes: that share each batch.
        accumulation: batches per optimizer update.
        total_updates: of the whole run.

    Returns:
        The number of batches written.

    Raises:
        UserError: an image cannot be read, or the folder not be written to.
    """
    loader = Loader(dataset, num_processes=num_processes, accumulation=accumulation, total_updates=total_updates)
    plan = dataset.plan(1, num_processes)
    lines: list[str] = []
    _remove_sheets(folder)
    for number, batch in enumerate(islice(loader.epoch(1), MOST_BATCHES)):
        uses = plan.share(number, 0, num_processes).uses
        draws = [dataset.draws(use, 1) for use in uses]  # but for the captions, which the batch has, they are those of the batch
        sheet = _SHEETS.format(number + 1)
        facts = list(_batch_facts(batch, draws, sheet))
        lines += [json.dumps(fact, default=str) for fact in facts]
        with atomic_write(folder / sheet) as temporary:
            contact_sheet(batch, [_title(fact) for fact in facts]).save(temporary, "PNG")
    atomic_write_text(folder / TEXTS, "".join(f"{line}\n" for line in lines))
    return min(len(plan.batches), MOST_BATCHES)


def _title(fact: dict[str, Any]) -> str:
    return f"{fact['place']}  {os.path.basename(fact['image'])}{', mirrored' if fact['flipped'] else ''}"


def _batch_facts(batch: Batch, draws: list[Draws], sheet: str) -> Iterator[dict[str, Any]]:
    for position, draw in enumerate(draws):
        original, target = batch.sizes.original_hw[position].tolist(), batch.sizes.target_hw[position].tolist()
        yield {
            "sheet": sheet,
            "place": position + 1,
            "image": batch.image_keys[position],
            "caption": batch.captions[position],
            "original_size": original[::-1],
            "crop_top_left": batch.sizes.crop_top_left[position].tolist(),
            "target_size": target[::-1],
            "resized": list(draw.placement.resized),
            "cropped_at": list(draw.placement.crop),
            "flipped": draw.flipped,
            "color_change": None if draw.color is None else asdict(draw.color),
            "loss_weight": batch.loss_weights[position].item(),
            "has_mask": batch.masks is not None,
            "has_conditioning_image": batch.conditioning is not None,
            "network_multiplier": batch.network_multiplier,
            "custom_attributes": dict(batch.custom_attributes[position]) if batch.custom_attributes else {},
        }


def _remove_sheets(folder: Path) -> None:
    for sheet in folder.glob("batch-[0-9][0-9][0-9].png"):
        sheet.unlink()
