"""Small copies of pictures that fit into a page."""

import base64
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from library.dataset.images import read_pixels
from library.dataset.items import Item
from library.options.errors import UserError

_SIDE = 224
_SHADE = 0.3
_QUALITY = 72
_THREADS = 4


def thumbnails(items: Iterable[Item], *, shows_crop: bool) -> Iterator[str | None]:
    """Yield each picture as the `src` of an `img`; None for one that cannot be read.

    Args:
        items: images of a dataset.
        shows_crop: darken what the crop cuts off.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(lambda item: _thumbnail(item, shows_crop), items)


def _thumbnail(item: Item, shows_crop: bool) -> str | None:
    try:
        picture = Image.fromarray(read_pixels(item.path, item.orientation))
    except UserError:
        return None
    picture.thumbnail((_SIDE, _SIDE))
    if shows_crop:
        picture = _with_crop(picture, item)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _with_crop(picture: Image.Image, item: Item) -> Image.Image:
    """Darken what lies outside of the part that is trained."""
    geometry = item.geometry
    scale_x, scale_y = picture.width / geometry.resized[0], picture.height / geometry.resized[1]
    (left, top), (width, height) = geometry.crop, geometry.bucket
    box = (
        round(left * scale_x),
        round(top * scale_y),
        max(round((left + width) * scale_x), round(left * scale_x) + 1),
        max(round((top + height) * scale_y), round(top * scale_y) + 1),
    )
    dark = Image.eval(picture, lambda value: int(value * _SHADE))
    dark.paste(picture.crop(box), box)
    return dark
