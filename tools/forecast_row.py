"""One cell of the table of tools/forecast_table.py: the peak of the training step, as `--dry_run` forecasts it."""

import json
import struct
from pathlib import Path

import torch
from PIL import Image

from library.memory.pretend import PretendAccelerator
from library.models.sdxl.build import build_parts, part_tensors
from library.models.sdxl.family import SdxlFamily
from library.models.sdxl.single_file import single_file_tensors
from library.models.sdxl.sizes import SdxlSizes
from library.options.parse import parse
from library.options.scripts import SdxlTrainNetworkOptions, SdxlTrainOptions
from library.training.building import Recipe, make_setting
from library.training.events import EventLog
from library.training.finetune_recipe import FinetuneRecipe
from library.training.forecast import Tracing
from library.training.inputs import dataset_definition
from library.training.network_recipe import NetworkRecipe
from library.training.phases import STEP

MOST_IMAGES = 8


def make_files(folder: Path) -> tuple[Path, Path]:
    """Write a checkpoint of full size that has a header and a hole, and a folder of blank pictures; return both."""
    tensors = single_file_tensors({name: part_tensors(part) for name, part in build_parts(SdxlSizes()).items()})
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    checkpoint = folder / "sdxl.safetensors"
    with checkpoint.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    images = folder / "images" / "1_blank"
    images.mkdir(parents=True)
    for number in range(MOST_IMAGES):
        Image.new("RGB", (1024, 1024), (number, 0, 0)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("blank")
    return checkpoint, images.parent


def forecast_gb(is_finetune: bool, words: list[str], checkpoint: Path, images: Path, batch_size: int) -> float:
    """Return the forecast of a training step in GB (10⁹ bytes).

    Args:
        is_finetune: whether sdxl_train.py is what runs; else sdxl_train_network.py.
        words: options beside those of files and sizes.
        checkpoint: see `make_files`.
        images: see `make_files`.
        batch_size: images per step.
    """
    argv = [*words, "--pretrained_model_name_or_path", str(checkpoint), "--train_data_dir", str(images)]
    argv += ["--resolution", "1024", "--train_batch_size", str(batch_size), "--output_dir", str(images)]
    options = parse(SdxlTrainOptions if is_finetune else SdxlTrainNetworkOptions, argv)
    recipe: Recipe = FinetuneRecipe(options) if isinstance(options, SdxlTrainOptions) else NetworkRecipe(options)  # type: ignore[arg-type]
    accelerator = PretendAccelerator(torch.device("cpu"), None)
    setting = make_setting(SdxlFamily.open, options, dataset_definition(options), None, EventLog(), accelerator)
    return round(Tracing(recipe, setting, ()).forecast([STEP]).phases[STEP].total / 1e9, 3)
