"""What is wrong or odd about a dataset: collected from every check, told together, the worst first.

Checks call `error` for what keeps a run from starting and `warning` for what only looks unintended. Nothing is raised or logged
before all of them have looked, so that a person repairs everything in one go.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum

from library.options.errors import UserError

NAMES_SHOWN = 5
_ERRORS_SHOWN, _WARNINGS_SHOWN = 10, 3
MOST_KEPT = 1000
"""Findings of one kind that are kept; more are only counted."""


class Severity(StrEnum):
    """Whether a run can go on."""

    ERROR = "error"
    WARNING = "warning"


class Kind(Enum):
    """What can be wrong, the worst first: a heading, and what to do about it where the sentences do not say so."""

    NO_IMAGES = ("Nothing to train on", "")
    METADATA = ("Metadata files or entries of them that cannot be used", "")
    UNRESOLVED = ("Entries of metadata files that lead to no image, or two to one", "")
    UNREADABLE_IMAGE = ("Images that cannot be read", "Repair or remove them.")
    FORMAT = ("Images in a format that another package reads", "Install it, or remove these images.")
    TOO_SMALL = ("Images too small or too narrow for their bucket", "")
    CONDITIONING = ("Control or mask images that are missing or do not fit", "")
    UNREADABLE_CAPTION = ("Captions that cannot be read", "")
    WITHOUT_WORD = ("Captions without the word that is learned", "Their images teach it nothing.")
    CACHE = ("Caches that cannot be made", "")
    CONFIG = ("Settings of the dataset that may not be meant", "")
    NO_CAPTION = ("Images without a caption", "Check caption_extension, or set class_tokens.")
    EMPTY_CAPTION = ("Images whose caption is empty", "Write captions, unless images without one are meant.")
    LONG_CAPTION = (
        "Captions longer than the text encoders read",
        "What is beyond is ignored. Shorten them, or raise --max_token_length to 150 or 225.",
    )
    DUPLICATE_PATH = ("Images listed more than once", "They are seen as often as they are listed.")
    SAME_CONTENT = ("Files with the same content", "Remove the copies, or raise num_repeats if more weight is meant.")
    SAME_STEM = (
        "Images of one folder that differ in the ending alone",
        "They share a caption file. sd-scripts would also share their caches; here each has its own.",
    )
    UPSCALED = (
        "Images that are enlarged",
        "They are trained blurred. Remove them, lower the resolution, or set bucket_no_upscale.",
    )
    CROPPED = (
        "Images of which much is cut off",
        "Set enable_bucket, widen min_bucket_reso and max_bucket_reso, or crop them yourself.",
    )
    SMALL_BUCKET = (
        "Buckets that do not fill a batch",
        "Their batches are smaller than the others. Add images of that shape, raise num_repeats, or lower batch_size.",
    )
    TURNED = (
        "Images stored turned or mirrored (EXIF orientation)",
        "They are set upright. Caches of other programs, which do not do this, are not used for them.",
    )
    COLOUR = ("Images that are converted to 8-bit RGB", "Convert them yourself if their colours matter.")
    TRANSPARENT = (
        "Images with an alpha channel",
        "What is transparent is trained as white; alpha_mask = true leaves it out of the loss instead.",
    )
    ANIMATED = ("Animated images", "Only the first frame is used.")
    UNUSED_CONTROL = ("Control or mask images that are not used", "")
    UNUSED_REG = ("Regularisation images that are not used", "")
    HELD_OUT = ("Images that are trained on nowhere because another dataset or subset holds them out for validation", "")
    UNUSED_IMAGES = ("Images that no entry of the metadata file names", "")

    def __init__(self, heading: str, advice: str) -> None:
        self.heading = heading
        self.advice = advice

    @property
    def key(self) -> str:
        """The name in files for programs."""
        return self.name.lower()


_RANKS = {kind: rank for rank, kind in enumerate(Kind)}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong or odd."""

    severity: Severity
    kind: Kind
    where: str
    """The image, file, folder or bucket."""
    sentence: str
    """Names the place and says what is wrong with it."""
    count: int = 1
    """How many images, files or entries it speaks of."""
    files: tuple[str, ...] = ()
    """Some of them, where there are several."""


class DatasetError(UserError):
    """A dataset cannot be trained on; every process looks at all of it."""

    is_found_by_all = True


class Findings:
    """Collects what the checks find; the same thing told twice counts once."""

    def __init__(self) -> None:
        self._problems: dict[tuple[Severity, Kind], dict[tuple[str, str], Problem]] = {}
        self._counts: dict[tuple[Severity, Kind], int] = {}

    def error(self, kind: Kind, where: str, sentence: str, *, count: int = 1, files: Sequence[str] = ()) -> None:
        """Note what keeps the run from starting.

        Args:
            kind: what it is.
            where: the image, file, folder or bucket.
            sentence: names the place and says what is wrong with it.
            count: how many images, files or entries the sentence speaks of.
            files: those, or some of them, where there are several.
        """
        self._add(Problem(Severity.ERROR, kind, where, sentence, count, tuple(files[:MOST_KEPT])))

    def warning(self, kind: Kind, where: str, sentence: str, *, count: int = 1, files: Sequence[str] = ()) -> None:
        """Note what looks unintended; the run goes on. See `error`."""
        self._add(Problem(Severity.WARNING, kind, where, sentence, count, tuple(files[:MOST_KEPT])))

    @property
    def has_errors(self) -> bool:
        """Whether anything keeps the run from starting."""
        return any(severity is Severity.ERROR for severity, _ in self._counts)

    def total(self, severity: Severity) -> int:
        """Return how many images, files or entries have problems of a severity."""
        return sum(count for (found, _), count in self._counts.items() if found is severity)

    def groups(self, severity: Severity) -> Iterator[tuple[Kind, int, list[Problem]]]:
        """Yield the kinds of problems of a severity, the worst first, each with its count and the problems that were kept."""
        kinds = sorted((kind for found, kind in self._counts if found is severity), key=_RANKS.__getitem__)
        for kind in kinds:
            yield kind, self._counts[severity, kind], list(self._problems[severity, kind].values())

    def warnings_of(self, kind: Kind) -> list[Problem]:
        """Return the warnings of one kind that were kept."""
        return list(self._problems.get((Severity.WARNING, kind), {}).values())

    def errors_of(self, kind: Kind) -> list[Problem]:
        """Return the errors of one kind that were kept."""
        return list(self._problems.get((Severity.ERROR, kind), {}).values())

    def lines(self, severity: Severity) -> list[str]:
        """Return the problems of a severity as a person reads them: by kind, with a few examples each."""
        shown = _ERRORS_SHOWN if severity is Severity.ERROR else _WARNINGS_SHOWN
        lines = []
        for kind, count, problems in self.groups(severity):
            lines.append(" ".join(filter(None, [f"{kind.heading}: {count}.", kind.advice])))
            lines += [f"  {problem.sentence}" for problem in problems[:shown]]
            left = count - sum(problem.count for problem in problems[:shown])
            if left > 0:
                lines.append(f"  and {left} more")
        return lines

    def raise_errors(self) -> None:
        """Stop where there are errors.

        Raises:
            DatasetError: tells all errors, and the warnings behind them.
        """
        if not self.has_errors:
            return
        errors = self.total(Severity.ERROR)
        told = ["The dataset has an error:" if errors == 1 else f"The dataset has {errors} errors:"]
        told += [f"  {line}" for line in self.lines(Severity.ERROR)]
        warnings = self.lines(Severity.WARNING)
        if warnings:
            told += ["Besides, this may not be meant:", *(f"  {line}" for line in warnings)]
        raise DatasetError("\n".join([*told, "Repair these and start again."]))

    def warning_text(self) -> str:
        """Return all warnings as one message, empty where there are none."""
        lines = self.lines(Severity.WARNING)
        return "\n".join(["The dataset can be used, but this may not be meant:", *(f"  {line}" for line in lines)]) if lines else ""

    def _add(self, problem: Problem) -> None:
        group = problem.severity, problem.kind
        kept = self._problems.setdefault(group, {})
        key = problem.where, problem.sentence
        if key in kept:
            return
        self._counts[group] = self._counts.get(group, 0) + problem.count
        if len(kept) < MOST_KEPT:
            kept[key] = problem


def names_of(paths: Sequence[str]) -> str:
    """Return the first few paths for a sentence, and how many more there are."""
    more = f" and {len(paths) - NAMES_SHOWN} more" if len(paths) > NAMES_SHOWN else ""
    return ", ".join(paths[:NAMES_SHOWN]) + more
