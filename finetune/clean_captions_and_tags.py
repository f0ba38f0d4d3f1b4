"""Make the captions and tags of a metadata file plainer: for anime pictures, harmful for others.

    python finetune/clean_captions_and_tags.py meta.json cleaned.json

Tags: underscores become blanks, and everything from `, rating` on is cut. Where the tags have `girls` or `boys`, those that nobody
can tell whose they are go: several eye colours, several lengths of hair. `shirt` goes beside `white shirt`. Captions: `woman`,
`person`, `anime character` and the like become `girl`. All else in an entry stays. An old form of the command has the image folder
in front, which is not used.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the project's folder is not on the path

from library.options.console import say, set_up_logging
from library.options.entry import run_script
from library.options.errors import UsageError
from library.options.groups.console import ConsoleOptions
from library.options.metadata_tools import source_problems, target_problems

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Clean what the command line names.

    Raises:
        UsageError: a path cannot be used.
        UserError: the metadata cannot be read or written.
    """
    set_up_logging(ConsoleOptions())
    arguments = read_command_line(argv)
    clean(arguments.in_json, arguments.out_json, debug=arguments.debug)


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("in_json", help="metadata file to clean")
    parser.add_argument("out_json", help="metadata file to write; may be the same")
    parser.add_argument("--debug", action="store_true", help="print every text before and after")
    return parser


def read_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line, in its old form with the image folder in front too.

    Raises:
        UsageError: with everything that is wrong with the paths.
    """
    parser = command_line()
    arguments, more = parser.parse_known_args(argv)
    if len(more) == 1 and not more[0].startswith("-"):
        logger.warning("%s is not used: the command has two files, the metadata to clean and the one to write.", arguments.in_json)
        arguments.in_json, arguments.out_json = arguments.out_json, more[0]
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    problems = source_problems(arguments.in_json) + target_problems(arguments.out_json)
    if problems:
        raise UsageError(problems)
    return arguments


def clean(in_json: str, out_json: str, *, debug: bool) -> None:
    """Write a metadata file with clean captions and tags; prints each text that changes if `debug`.

    Raises:
        UserError: the metadata cannot be read or written.
    """
    from library.dataset.metadata_clean import clean_caption, clean_tags
    from library.dataset.metadata_edit import read_entries, write_entries

    entries = read_entries(in_json)
    counts = []
    for field, cleaned in (("tags", clean_tags), ("caption", clean_caption)):
        described = {key: entry for key, entry in entries.items() if entry.get(field)}
        changes = {key: after for key, entry in described.items() if (after := cleaned(entry[field])) != entry[field]}
        for key, after in changes.items():
            if debug:
                say(f"{key}: {field}\n  {entries[key][field]}\n  {after}")
            entries[key][field] = after
        counts.append(f"{field} changed in {len(changes)}, missing in {len(entries) - len(described)}")
    write_entries(out_json, entries)
    say(f"Wrote {out_json}: {len(entries)} entries; {'; '.join(counts)}.")


if __name__ == "__main__":
    run_script(main)
