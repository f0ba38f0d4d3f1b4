"""Shrink the pictures of a folder to one or more sizes, each `cat.png` to `cat+512x512.jpg` and so on in another folder.

    python tools/resize_images_to_resolution.py pictures small
    python tools/resize_images_to_resolution.py pictures small --max_resolution 1024x1024,768x768 --divisible_by 32
    python tools/resize_images_to_resolution.py pictures small --save_as_png --copy_associated_files

A size bounds the number of pixels, not the sides: pictures keep their shape, are set upright, and are never enlarged. With
--divisible_by their edges are cut so that both sides are multiples. Pictures with transparency are always saved as PNG. Files that
are no pictures are copied; the source folder stays as it is. Damaged pictures are named at the end, all others are done.
"""

import argparse
import math
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the project's folder is not on the path

from library.files.atomic import atomic_write
from library.options.console import say, set_up_logging
from library.options.entry import run_script
from library.options.errors import UsageError, UserError
from library.options.groups.console import ConsoleOptions

if TYPE_CHECKING:
    from PIL import Image

    from library.dataset.images import Pixels

Size = tuple[int, int]

RESAMPLERS = {"area": "area", "cubic": "cubic", "lanczos4": "lanczos", "nearest": "nearest", "linear": "linear", "box": "box"}
"""By name of `--interpolation`: the resampling method as training knows it."""
OPAQUE = 255
_CACHES = (".npz", ".safetensors")
"""Endings of files that hold a picture at its old size."""


@dataclass(frozen=True)
class Order:
    """What was asked for."""

    source: Path
    target: Path
    sizes: tuple[Size, ...]
    divisible_by: int
    interpolation: str | None
    as_png: bool
    with_associated: bool


def main(argv: Sequence[str]) -> None:
    """Shrink what the command line names.

    Raises:
        UsageError: an option or folder cannot be used.
        UserError: pictures cannot be read, or the folder is not writable.
    """
    order = read_command_line(argv)
    set_up_logging(ConsoleOptions())
    resize_folder(order)


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src_img_folder", help="folder of the pictures; its sub-folders are left out")
    parser.add_argument("dst_img_folder", help="folder to write to; made if it does not exist")
    parser.add_argument(
        "--max_resolution",
        default="512x512,384x384,256x256,128x128",
        help="sizes as WIDTHxHEIGHT with commas, whose product a picture's pixels do not exceed (%(default)s)",
    )
    parser.add_argument("--divisible_by", type=int, default=1, help="cut edges so that both sides are multiples (%(default)s)")
    parser.add_argument("--interpolation", choices=list(RESAMPLERS), help="resampling method; area when left out")
    parser.add_argument("--save_as_png", action="store_true", help="save PNG instead of JPEG of quality 100")
    parser.add_argument("--copy_associated_files", action="store_true", help="copy captions and the like for each size")
    return parser


def read_command_line(argv: Sequence[str]) -> Order:
    """Read and check the command line.

    Raises:
        UsageError: with everything that is wrong.
    """
    arguments = command_line().parse_args(argv)
    source, target = Path(arguments.src_img_folder), Path(arguments.dst_img_folder)
    problems = []
    if not source.is_dir():
        problems.append(f"There is no folder {source}. Paths start at {os.getcwd()}.")
    if target.exists() and not target.is_dir():
        problems.append(f"{target} is a file. Name a folder to write to.")
    if source.is_dir() and target.is_dir() and source.samefile(target):
        problems.append(f"{target} is the source folder itself. Name another folder to write to.")
    if arguments.divisible_by < 1:
        problems.append(f"--divisible_by must be at least 1, not {arguments.divisible_by}.")
    sizes = [_size(text) for text in arguments.max_resolution.split(",")]
    if None in sizes:
        problems.append(f"--max_resolution must be sizes such as 512x512 with commas between, not {arguments.max_resolution!r}.")
    if problems:
        raise UsageError(problems)
    return Order(
        source=source,
        target=target,
        sizes=tuple(dict.fromkeys(size for size in sizes if size)),
        divisible_by=arguments.divisible_by,
        interpolation=RESAMPLERS[arguments.interpolation] if arguments.interpolation else None,
        as_png=arguments.save_as_png,
        with_associated=arguments.copy_associated_files,
    )


def resize_folder(order: Order) -> None:
    """Write all sizes of all pictures of a folder, and its other files.

    Raises:
        UserError: there are no pictures; two would get one name; pictures cannot be read, in which case all others were written; or
            the folder is not writable.
    """
    from tqdm import tqdm

    from library.dataset.formats import IMAGE_EXTENSIONS, list_images

    images = [Path(path) for path in list_images(str(order.source))]
    if not images:
        raise UserError(f"There are no pictures ({' '.join(IMAGE_EXTENSIONS)}) in {order.source}.")
    by_name = defaultdict(list)
    for path in images:
        by_name[path.stem].append(path)
    if shared := [" and ".join(path.name for path in paths) for paths in by_name.values() if len(paths) > 1]:
        raise UserError(f"Pictures in {order.source} would get the same names: {'; '.join(shared)}. Rename all but one.")
    rest = sorted(set(order.source.iterdir()) - set(images))
    others = [path for path in rest if path.is_file() and not path.name.startswith(".")]
    with _workers() as pool:
        outcomes = pool.map(lambda path: _resize(path, order), images)
        bar = tqdm(outcomes, desc="resizing", total=len(images), disable=None)  # None shows it on terminals only
        by_stem = {path.stem: problem for path, problem in zip(images, bar, strict=True)}
    problems, written = [problem for problem in by_stem.values() if problem], {stem for stem in by_stem if not by_stem[stem]}
    for path in others:
        copy(path, order.target / path.name)
        if order.with_associated and path.suffix not in _CACHES and path.stem in written:
            for size in order.sizes:
                copy(path, order.target / f"{_sized(path.stem, size)}{path.suffix}")
    num_done, sizes = len(images) - len(problems), ", ".join(map(_text, order.sizes))
    done = f"Wrote {num_done} pictures at {sizes} and copied {len(others)} other files to {order.target}."
    if problems:
        head = f"{len(problems)} of {len(images)} pictures could not be resized:"
        raise UserError("\n".join([head, *(f"  {problem}" for problem in problems), done]))
    say(done)


def shrink(path: Path, order: Order) -> Iterator[tuple[Size, "Image.Image"]]:
    """Yield each size of a picture, made from the original.

    Raises:
        UserError: it cannot be read, or nothing would be left of it.
    """
    from library.dataset.images import inspect_image, read_with_alpha

    facts = inspect_image(str(path))
    pixels = read_with_alpha(str(path), facts.orientation)
    if pixels[..., 3].min() == OPAQUE:
        pixels = pixels[..., :3]
    profile = _colour_profile(path)
    for size in order.sizes:
        (width, height), kept = shrunk_and_cut(facts.size, size, order.divisible_by)
        if 0 in kept:
            raise UserError(
                f"{path} is {_text(facts.size)}, of which --max_resolution {_text(size)} leaves {width}x{height} and "
                f"--divisible_by {order.divisible_by} leaves {_text(kept)}. Remove it or lower --divisible_by."
            )
        left, top = (width - kept[0]) // 2, (height - kept[1]) // 2
        picture = _shrunk(pixels, (width, height), order.interpolation).crop((left, top, left + kept[0], top + kept[1]))
        picture.info["icc_profile"] = profile
        yield size, picture


def save(picture: "Image.Image", path: Path, *, as_png: bool) -> None:
    """Write a picture under a name without ending: as PNG if that is wanted or it is transparent, else as JPEG.

    Raises:
        UserError: the disk is full or the folder not writable.
    """
    is_png = as_png or picture.mode == "RGBA"
    profile = picture.info["icc_profile"]
    with atomic_write(path.with_name(f"{path.name}{'.png' if is_png else '.jpg'}")) as temporary:
        if is_png:
            picture.save(temporary, format="PNG", icc_profile=profile)
        else:
            picture.save(temporary, format="JPEG", quality=100, subsampling=0, icc_profile=profile)


def shrunk_and_cut(size: Size, bound: Size, divisor: int) -> tuple[Size, Size]:
    """Return the size a picture is resized to, in proportion and never larger, and what of it is kept.

    Args:
        size: width and height of the picture.
        bound: the product of its sides is the most pixels the picture may have.
        divisor: of both sides of what is kept.
    """
    (width, height), most = size, bound[0] * bound[1]
    if width * height > most:
        width, height = math.isqrt(most * width // height), math.isqrt(most * height // width)
    return (width, height), (width // divisor * divisor, height // divisor * divisor)


def copy(source: Path, target: Path) -> None:
    """Copy a file, or leave the old target whole.

    Raises:
        UserError: the disk is full or the folder not writable.
    """
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


def _size(text: str) -> Size | None:
    numbers = text.strip().lower().split("x")
    if len(numbers) != 2 or not all(number.isascii() and number.isdigit() and int(number) for number in numbers):
        return None
    return int(numbers[0]), int(numbers[1])


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _sized(stem: str, size: Size) -> str:
    return f"{stem}+{_text(size)}"


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Give a thread per processor; decoding and resizing run at the same time. An error or Ctrl+C drops what has not begun."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _resize(path: Path, order: Order) -> str | None:
    """Write all sizes of a picture, or return what is wrong with it; a folder that cannot be written to ends everything."""
    try:
        pictures = dict(shrink(path, order))
    except UserError as error:
        return str(error)
    for size, picture in pictures.items():
        save(picture, order.target / _sized(path.stem, size), as_png=order.as_png)
    return None


def _shrunk(pixels: "Pixels", size: Size, interpolation: str | None) -> "Image.Image":
    """Resize a picture; where it is transparent, colours count by how much they are seen."""
    import numpy as np
    from PIL import Image

    from library.dataset.images import resize

    if pixels.shape[-1] == 3:
        return Image.fromarray(resize(np.ascontiguousarray(pixels), size, interpolation))
    weighted = np.asarray(Image.fromarray(pixels).convert("RGBa"))
    colours = resize(np.ascontiguousarray(weighted[..., :3]), size, interpolation)
    opacity = resize(np.ascontiguousarray(pixels[..., 3]), size, interpolation)
    return Image.frombytes("RGBa", size, np.dstack([colours, opacity]).tobytes()).convert("RGBA")


def _colour_profile(path: Path) -> bytes | None:
    """Return the picture's colour profile, if it still holds once the picture is RGB."""
    from PIL import Image

    with Image.open(path) as image:
        profile: bytes | None = image.info.get("icc_profile")
        return profile if image.mode in ("RGB", "RGBA", "P") else None


if __name__ == "__main__":
    run_script(main)
