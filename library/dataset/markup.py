"""Write HTML that is safe by construction: every text is escaped unless it was made here."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

_EMPTY_ELEMENTS = frozenset({"br", "img", "meta"})


class Html(str):
    """A text that is HTML already."""

    __slots__ = ()


def element(name: str, /, *children: Any, **attributes: Any) -> Html:
    """Return an element.

    Args:
        name: of the element.
        children: texts, which are escaped, and elements.
        attributes: by name; `class_` is `class`, underscores are dashes, and None leaves an attribute out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items() if value is not None
    )
    if name in _EMPTY_ELEMENTS:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{''.join(text(child) for child in children)}</{name}>")


def join(parts: Iterable[Any]) -> Html:
    """Put elements and texts one after the other."""
    return Html("".join(text(part) for part in parts))


def text(value: Any) -> Html:
    """Return a value as HTML: what is none already is escaped; of file names that are not UTF-8, the odd bytes are written out."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(str(value).encode("utf-8", "backslashreplace").decode("utf-8"), quote=True))


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Any]], *, texts: int = 1) -> Html:
    """Return a table that scrolls by itself where the window is too narrow.

    Args:
        caption: says what it shows.
        heads: of the columns.
        rows: texts, numbers and elements.
        texts: so many leading columns hold texts; numbers in the others are aligned to the right.
    """
    head = element(
        "tr", *(element("th", name, scope="col", class_=None if i < texts else "number") for i, name in enumerate(heads))
    )
    body = [_row(row, texts) for row in rows]
    return element(
        "div",
        element("table", element("caption", caption), element("thead", head), element("tbody", *body)),
        class_="scroll", tabindex=0, role="region", aria_label=caption,
    )  # fmt: skip


def bar(share: float, *, marked: bool = False) -> Html:
    """Return a bar beside a number; it says nothing that the number does not."""
    width = f"width:{max(0.0, min(1.0, share)) * 100:.1f}%"
    return element("span", element("span", style=width), class_="bar marked" if marked else "bar", aria_hidden="true")


def _row(cells: Sequence[Any], texts: int) -> Html:
    first = element("th", cells[0], scope="row")
    rest = (
        element("td", cell, class_=None if position < texts or isinstance(cell, Html) else "number")
        for position, cell in enumerate(cells[1:], start=1)
    )
    return element("tr", first, *rest)
