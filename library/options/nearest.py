"""The known name a mistyped one was probably meant to be."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is closest in spelling, or None when nothing is near."""
    matches = get_close_matches(name.replace("-", "_").lower(), list(known), n=1, cutoff=0.7)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return " Did you mean ...?" naming the nearest known name, or nothing."""
    found = nearest(name, known)
    return f" Did you mean {prefix}{found}?" if found else ""
