"""Mistakes a person can make, as exceptions whose text is the whole answer.

Every message names what is wrong, the value received, what is allowed and what to do. Scripts print the text and stop with
`exit_status`; a traceback is only ever shown for a defect of ours.
"""

from collections.abc import Callable, Sequence


class UserError(ValueError):
    """Something the person gave cannot be used: a file, a folder, an image, a full disk.

    The message is one or more complete sentences that name the file, key or image and say what to do.
    """

    exit_status = 1
    is_found_by_all = False
    """Whether each process of a launch finds it, so that the first alone tells it."""


class UsageError(UserError):
    """The command line or a configuration file is wrong: everything wrong with it, told together.

    Args:
        problems: one sentence each, in the order a person would meet them; never empty.
    """

    exit_status = 2
    is_found_by_all = True

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def problems_of(check: Callable[[], object]) -> list[str]:
    """Run a check and return what it complains about, to be told together with other complaints."""
    try:
        check()
    except UsageError as error:
        return list(error.problems)
    except UserError as error:
        return [str(error)]
    return []
