"""Make the tags and captions of anime pictures plainer, as sd-scripts' cleaning does.

Both only know text: what contradicts itself or says a thing twice goes. Other pictures than anime are better left alone.
"""

import re
from collections.abc import Callable

_WORD = r"[\w\-]+"

_SEVERAL_PEOPLE = ("girls", "boys")
_ONE_OF_A_KIND = tuple(
    re.compile(kind)
    for kind in (
        "(long|short|medium) hair",
        "(bob|hime) cut",
        f"{_WORD} eyes",
        f"{_WORD} sleeves|sleeveless",
        f"ponytail|braid|ahoge|twintails|{_WORD} bun|single hair bun|single side bun|two side up|two tails|{_WORD} braid|sidelocks",
        f"(?!(long|short|medium) ){_WORD} hair",
    )
)
"""Tags of which a person has one: with several people and several such tags nobody knows whose is whose."""

_SHORT_TAG = re.compile(f"{_WORD}|hair ornament")

_REPLACEMENTS = (
    ("anime anime", "anime"),
    ("young ", ""),
    ("anime girl", "girl"),
    ("cartoon female", "girl"),
    ("cartoon lady", "girl"),
    ("cartoon character", "girl"),
    ("cartoon woman", "girl"),
    ("cartoon women", "girls"),
    ("cartoon girl", "girl"),
    ("anime female", "girl"),
    ("anime lady", "girl"),
    ("anime character", "girl"),
    ("anime woman", "girl"),
    ("anime women", "girls"),
    ("lady", "girl"),
    ("female", "girl"),
    ("woman", "girl"),
    ("women", "girls"),
    ("people", "girls"),
    ("person", "girl"),
    ("a cartoon figure", "a figure"),
    ("a cartoon image", "an image"),
    ("a cartoon picture", "a picture"),
    ("an anime cartoon image", "an image"),
    ("a cartoon anime drawing", "a drawing"),
    ("a cartoon drawing", "a drawing"),
    ("girl girl", "girl"),
)
"""What becomes what, in this order; parts of longer words too."""


def clean_tags(tags: str) -> str:
    """Return tags, separated by a comma and a blank, without what is of no use.

    Underscores become blanks, everything from a rating on is cut, tags of which nobody knows whose they are go where the picture
    shows several people, and so do tags that a longer one ends with.
    """
    text = "^_^".join(part.replace("_", " ") for part in tags.split("^_^"))
    text = text.partition(", rating")[0]
    kept = text.split(", ")
    if any(people in text for people in _SEVERAL_PEOPLE):
        for kind in _ONE_OF_A_KIND:
            kept = _without_several(kept, kind.fullmatch)
    return ", ".join(tag for tag in kept if not (_SHORT_TAG.fullmatch(tag) and any(other.endswith(f" {tag}") for other in kept)))


def clean_caption(caption: str) -> str:
    """Return a caption in which every person is a girl and no picture is called a cartoon."""
    for before, after in _REPLACEMENTS:
        while before in caption:
            caption = caption.replace(before, after)
    return caption


def _without_several(tags: list[str], belongs: Callable[[str], object]) -> list[str]:
    others = [tag for tag in tags if not belongs(tag)]
    return others if len(tags) - len(others) > 1 else tags
