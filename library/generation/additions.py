"""Words and control networks that a run adds to the model, checked before anything heavy is loaded."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.dataset.formats import list_images, teach_pillow
from library.generation.network_files import nth_or
from library.generation.request import ImageRequest
from library.options.errors import UsageError
from library.options.groups.generation import GenNetworkOptions


@dataclass(frozen=True)
class ControlFile:
    """One ControlNet-LLLite to attach."""

    path: str
    multiplier: float = 1.0
    ratio: float = 1.0
    """Share of the sampling steps, from the first on, in which it acts."""


def planned_words(options: GenNetworkOptions) -> list[str]:
    """Return the files of learned words; a file's name without ending is the word.

    Raises:
        UsageError: a file does not exist, or two stand for one word; all told together.
    """
    paths = list(options.textual_inversion_embeddings or ())
    problems = [*_missing_files("textual_inversion_embeddings", paths)]
    counts = Counter(Path(path).stem.lower() for path in paths)
    problems += [
        f"--textual_inversion_embeddings: {count} files stand for the word {word}; rename one of them."
        for word, count in counts.items()
        if count > 1
    ]
    if problems:
        raise UsageError(problems)
    return paths


def planned_controls(options: GenNetworkOptions) -> list[ControlFile]:
    """Return the control networks in the order of the command line.

    Raises:
        UsageError: a file does not exist, a number has no network, or networks and guide images do not go together; all told.
    """
    paths = options.control_net_lllite_models or ()
    numbers = {"control_net_multipliers": options.control_net_multipliers, "control_net_ratios": options.control_net_ratios}
    problems = [*_missing_files("control_net_lllite_models", paths)]
    problems += [
        f"--{name} has {len(values)} values for {len(paths)} networks of --control_net_lllite_models; give at most one for each."
        for name, values in numbers.items()
        if values and len(values) > len(paths)
    ]
    problems += _image_problems(options)
    if problems:
        raise UsageError(problems)
    return [
        ControlFile(path, *(nth_or(values or (), index, 1.0) for values in numbers.values())) for index, path in enumerate(paths)
    ]


def with_guide_images(
    requests: Sequence[ImageRequest], images: Sequence[str], num_controls: int, first: int = 0
) -> list[ImageRequest]:
    """Give each picture one guide image for each control network; the images are used in order, over and over.

    Args:
        requests: in the order they are drawn.
        images: files, as `guide_images` lists them.
        num_controls: how many control networks there are.
        first: pictures drawn before these.
    """
    if not num_controls:
        return list(requests)
    turns = [tuple(images[start : start + num_controls]) for start in range(0, len(images), num_controls)]
    return [replace(request, guides=turns[(first + index) % len(turns)]) for index, request in enumerate(requests)]


def guide_images(options: GenNetworkOptions) -> list[str]:
    """Return the files of `--guide_image_path`, those of a folder sorted by name."""
    return [file for path in options.guide_image_path or () for file in _images_at(Path(path))]


def _images_at(path: Path) -> list[str]:
    return list_images(str(path)) if path.is_dir() else [str(path)]


def _image_problems(options: GenNetworkOptions) -> Iterator[str]:
    num_controls = len(options.control_net_lllite_models or ())
    missing = [path for path in options.guide_image_path or () if not Path(path).exists()]
    yield from (f"--guide_image_path {path}: there is no such file or folder; check the path." for path in missing)
    if missing:
        return
    images = guide_images(options)
    for path in filter(_is_no_image, images):
        yield f"--guide_image_path {path}: this is no image that can be read; save it again as PNG."
    num_images = len(images)
    if num_controls and not options.guide_image_path:
        yield "--control_net_lllite_models needs --guide_image_path: the images that the pictures follow."
    elif options.guide_image_path and not num_controls:
        yield "--guide_image_path is followed by nothing without --control_net_lllite_models; leave it out."
    elif num_controls and (not num_images or num_images % num_controls):
        yield (
            f"--guide_image_path: there are {num_images} images for {num_controls} networks of --control_net_lllite_models; give "
            "one for each network, or a multiple of that."
        )


def _is_no_image(path: str) -> bool:
    from PIL import Image

    teach_pillow(path)
    try:
        with Image.open(path):
            return False
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return True


def _missing_files(option: str, paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        if not Path(path).is_file():
            yield f"--{option} {path}: there is no such file; check the path."
