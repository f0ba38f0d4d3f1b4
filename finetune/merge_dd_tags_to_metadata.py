"""Put the tags that lie beside images, `cat.txt` beside `cat.png`, into a metadata file for `--in_json`.

    python finetune/merge_dd_tags_to_metadata.py pictures meta.json
    python finetune/merge_dd_tags_to_metadata.py pictures tagged.json --in_json captioned.json
    python finetune/merge_dd_tags_to_metadata.py parent meta.json --full_path --recursive

Entries that the file has already stay, with everything in them but the tags. Where an image has no tag file, all such images are
named and nothing is written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the project's folder is not on the path

from library.options.console import set_up_logging
from library.options.entry import run_script
from library.options.groups.console import ConsoleOptions
from library.options.metadata_tools import merge_request, merging_parser


def main(argv: Sequence[str]) -> None:
    """Merge what the command line names.

    Raises:
        UsageError: a path cannot be used.
        UserError: tags are missing or a file cannot be read.
    """
    request = merge_request(command_line().parse_args(argv))
    set_up_logging(ConsoleOptions())
    from library.dataset.metadata_merge import merge_texts

    merge_texts(request, "tags")


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return merging_parser(__doc__, "tags", ".txt")


if __name__ == "__main__":
    run_script(main)
