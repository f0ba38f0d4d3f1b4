"""The command line that the tools for metadata files share, and what may be wrong with the paths on it."""

import argparse
import os
from dataclasses import dataclass

from library.options.errors import UsageError


@dataclass(frozen=True)
class MergeRequest:
    """What a merging tool was asked for."""

    train_data_dir: str
    out_json: str
    in_json: str | None
    """The file whose entries are kept and added to; None starts with none."""
    extension: str
    """Of the text files, with its dot."""
    full_path: bool
    """Whether entries are named by the image's path instead of its bare name."""
    recursive: bool
    debug: bool
    """Whether each text is printed."""


def merging_parser(manual: str | None, what: str, extension: str) -> argparse.ArgumentParser:
    """Return the parser of a tool that puts text files into a metadata file.

    Args:
        manual: the tool's docstring.
        what: what the text files hold, in the plural.
        extension: of the text files, when none is given.
    """
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_data_dir", help="folder of the images and their text files")
    parser.add_argument("out_json", help="metadata file to write")
    parser.add_argument("--in_json", help="metadata file to start from; out_json itself when left out and there")
    parser.add_argument("--caption_extension", default=extension, help=f"ending of the files with {what} (%(default)s)")
    parser.add_argument("--full_path", action="store_true", help="name entries by the image's path instead of its bare name")
    parser.add_argument("--recursive", action="store_true", help="search sub-folders too; needs --full_path")
    parser.add_argument("--debug", action="store_true", help=f"print the {what} of each image")
    return parser


def merge_request(arguments: argparse.Namespace) -> MergeRequest:
    """Check what a parser of `merging_parser` read.

    Raises:
        UsageError: with everything that is wrong.
    """
    problems = folder_problems(arguments.train_data_dir)
    if arguments.in_json is not None:
        problems += source_problems(arguments.in_json)
    problems += target_problems(arguments.out_json)
    if arguments.recursive and not arguments.full_path:
        problems.append("--recursive needs --full_path: images in different folders may have the same name. Add it.")
    if problems:
        raise UsageError(problems)
    there = arguments.out_json if os.path.exists(arguments.out_json) else None
    return MergeRequest(
        train_data_dir=arguments.train_data_dir,
        out_json=arguments.out_json,
        in_json=there if arguments.in_json is None else arguments.in_json,
        extension=_with_dot(getattr(arguments, "caption_extention", None) or arguments.caption_extension),
        full_path=arguments.full_path,
        recursive=arguments.recursive,
        debug=arguments.debug,
    )


def folder_problems(folder: str) -> list[str]:
    """Say what keeps a folder of images from being read."""
    return [] if os.path.isdir(folder) else [f"There is no folder {folder}. Paths start at {os.getcwd()}."]


def source_problems(path: str) -> list[str]:
    """Say what keeps a metadata file from being read."""
    return [] if os.path.isfile(path) else [f"There is no file {path}. Name a metadata file (.json)."]


def target_problems(path: str) -> list[str]:
    """Say what keeps a metadata file from being written."""
    if os.path.isdir(path):
        return [f"{path} is a folder. Name the metadata file to write, for example {os.path.join(path, 'meta.json')}."]
    if path.lower().endswith(".jsonl"):
        return [f"{path} should end in .json: one object with all entries is written, and .jsonl is read line by line."]
    return []


def _with_dot(extension: str) -> str:
    return extension if not extension or extension.startswith(".") else f".{extension}"
