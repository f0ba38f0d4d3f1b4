"""Sizes of memory for people."""


def gib(size: int) -> str:
    """Return a number of bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"
