"""Reading files of prompts: the text, and the lines of it that are prompts."""

from collections.abc import Iterator
from pathlib import Path

from library.options.errors import UserError


def read_prompt_text(path: str, option: str) -> str:
    """Return the text of a prompt file.

    Args:
        path: of the file, in UTF-8 with or without a byte order mark.
        option: that names the file.

    Raises:
        UserError: it is missing, not UTF-8 or cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{option} {path}: there is no such file; check the path.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{option} {path}: not a UTF-8 text (byte {error.start}); save the file as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{option} {path}: the file cannot be read: {error.strerror}.") from None


def prompt_lines(path: str, text: str) -> Iterator[tuple[str, str]]:
    """Yield where it stands and the text of each line that is a prompt: not blank, not beginning with `#`."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            yield f"{path}, line {number}", line
