"""Which files are pictures, and the packages that read the rarer kinds."""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
"""File name endings that count as pictures, in lower case; every other spelling (.PNG, .Png) counts too."""

_ENDINGS = frozenset(IMAGE_EXTENSIONS)


@dataclass(frozen=True)
class _PlugIn:
    """What reads a format that Pillow may lack."""

    format: str
    modules: tuple[str, ...]
    """Any of them teaches Pillow the format when it is imported."""
    command: str
    """Installs the one we recommend."""


_PLUG_INS = {
    ".avif": _PlugIn("AVIF", ("pillow_avif",), "pip install pillow-avif-plugin"),
    ".jxl": _PlugIn("JPEG XL", ("pillow_jxl", "jxlpy.JXLImagePlugin"), "pip install pillow-jxl-plugin"),
}


def is_image_name(name: str) -> bool:
    """Say whether a file of this name counts as a picture; hidden ones do not."""
    return name[:1] != "." and name[name.rfind(".") :].lower() in _ENDINGS  # called for every file of a folder


def list_images(folder: str) -> list[str]:
    """Return the pictures directly in a folder, sorted by name, those that a missing package would read included."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if is_image_name(entry.name) and entry.is_file()]
    return [os.path.join(folder, name) for name in sorted(names)]


def teach_pillow(path: str) -> None:
    """Load what reads a picture of this name, where there is such a package; the others Pillow knows by itself."""
    _can_read(os.path.splitext(path)[1].lower())


def without_package(paths: Iterable[str]) -> dict[str, list[str]]:
    """Return the pictures that a package is missing for, by a clause that says which; all others can be tried."""
    found: dict[str, list[str]] = defaultdict(list)
    paths = list(paths)
    whole = "".join(paths).lower()  # one search through all names: most folders hold no rare formats
    if not any(ending in whole for ending in _PLUG_INS):
        return {}
    endings = {ending for ending in {path[path.rfind(".") :] for path in paths} if not _can_read(ending.lower())}
    for path in paths if endings else ():
        if (ending := path[path.rfind(".") :]) in endings:
            plug_in = _PLUG_INS[ending.lower()]
            found[f"{plug_in.format}, which needs another package: {plug_in.command}"].append(path)
    return dict(found)


@cache
def _can_read(ending: str) -> bool:
    plug_in = _PLUG_INS.get(ending)
    if plug_in is None:
        return True
    from PIL import features  # commands that list pictures answer --help without it

    if ending == ".avif" and features.check("avif"):
        return True
    for module in plug_in.modules:
        try:
            import_module(module)
        except ImportError:
            continue
        return True
    return False
