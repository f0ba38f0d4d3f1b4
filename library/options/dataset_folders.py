"""The folders and files that stand for a dataset file on the command line."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from library.options.dataset_file import Place
from library.options.groups.dataset import DatasetOptions

SOURCE_OPTIONS = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")
"""Options that say where images are, which a dataset file does in their place."""


@dataclass
class CommandLineSubsets:
    """Subsets in the form of a dataset file, and what is wrong or odd about the options they come from."""

    subsets: list[Place] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def command_line_subsets(dataset: DatasetOptions) -> CommandLineSubsets:
    """Return the subsets that `--train_data_dir` gives together with one of the other options."""
    found = CommandLineSubsets()
    folder = dataset.train_data_dir
    if not folder:
        given = [f"--{name} {getattr(dataset, name)}" for name in SOURCE_OPTIONS if getattr(dataset, name)]
        found.problems.append(
            f"{', '.join(given)} needs --train_data_dir FOLDER, the folder of the images."
            if given
            else "No images: give --dataset_config FILE, or --train_data_dir FOLDER with folders such as '10_sks dog'."
        )
    elif dataset.conditioning_data_dir:
        _with_conditioning_images(found, dataset, folder, dataset.conditioning_data_dir)
    elif dataset.in_json:
        if dataset.reg_data_dir:
            found.warnings.append("--reg_data_dir is ignored because --in_json names the images.")
        found.subsets.append(Place("--in_json", "", {"metadata_file": dataset.in_json, "image_dir": folder}))
    else:
        found.subsets += [
            Place("--train_data_dir", "", table) for table in _folders(found, folder, "--train_data_dir", is_reg=False)
        ]
        if dataset.reg_data_dir:
            folders = _folders(found, dataset.reg_data_dir, "--reg_data_dir", is_reg=True)
            found.subsets += [Place("--reg_data_dir", "", table) for table in folders]
    return found


def _with_conditioning_images(found: CommandLineSubsets, dataset: DatasetOptions, folder: str, conditioning: str) -> None:
    """Take the images that lie in the folder itself: there is one folder of images for one of conditioning images."""
    others = [f"--{name}" for name in ("reg_data_dir", "in_json") if getattr(dataset, name)]
    if others:
        found.problems.append(
            f"{' and '.join(others)} cannot be used with --conditioning_data_dir, which is for images in --train_data_dir. "
            "Leave one of them out."
        )
    if os.path.isdir(folder) and not any(entry.is_file() for entry in os.scandir(folder)):
        found.problems.append(
            f"--train_data_dir {folder} holds no images: with --conditioning_data_dir they lie in the folder itself, not in "
            "folders such as '10_sks dog'. For several folders write a --dataset_config."
        )
    found.subsets.append(Place("--conditioning_data_dir", "", {"image_dir": folder, "conditioning_data_dir": conditioning}))


def _folders(found: CommandLineSubsets, parent: str, flag: str, *, is_reg: bool) -> Iterator[dict[str, Any]]:
    """Yield a subset for each folder whose name is a number of repeats, optionally followed by `_` and class tokens."""
    if not os.path.isdir(parent):
        found.problems.append(f"{flag} {parent}: there is no such folder. Paths start at {os.getcwd()}.")
        return
    any_fits = False
    for name in sorted(entry.name for entry in os.scandir(parent) if entry.is_dir()):
        count, _, class_tokens = name.partition("_")
        path = os.path.join(parent, name)
        try:
            repeats = int(count)
        except ValueError:
            found.warnings.append(f"{path} is skipped: its name does not start with a number of repeats, as in 10_{name}.")
            continue
        any_fits = True
        yield {"image_dir": path, "num_repeats": repeats, "class_tokens": class_tokens, "is_reg": is_reg}
    if not any_fits:
        found.problems.append(f"{flag} {parent} has no folder named REPEATS_CLASS, such as '10_sks dog'. Put the images into one.")
