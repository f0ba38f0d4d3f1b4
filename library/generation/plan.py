"""What a run will draw, read and checked before anything heavy is loaded."""

import glob
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from library.generation.additions import planned_controls, planned_words
from library.generation.network_files import planned_networks
from library.generation.prompt_file import prompt_lines, read_prompt_text
from library.generation.prompt_line import GENERATION, PromptLine, parse_prompt_line
from library.generation.request import MIN_SIDE, SIDE_STEP, ImageRequest, rounded_side
from library.generation.seeds import SeedSeries
from library.options.errors import UsageError, UserError
from library.options.groups.generation import PictureOptions, PromptOptions, SizeConditioningOptions
from library.options.scripts import SdxlGenImgOptions

logger = logging.getLogger(__name__)

DEFAULT_SIDE = 1024
"""Width and height in pixels where neither option nor prompt gives one."""
_DYNAMIC = re.compile(r"\{[^{}]*(\||\$\$)[^{}]*\}")


@dataclass(frozen=True)
class LocatedPrompt:
    """One prompt as typed, with its options taken apart, and where it stands."""

    where: str
    raw: str
    line: PromptLine


@dataclass(frozen=True)
class PictureSettings:
    """The option groups that say how a prompt is drawn unless its own line says otherwise."""

    prompt: PromptOptions
    picture: PictureOptions
    size: SizeConditioningOptions

    @classmethod
    def of(cls, options: SdxlGenImgOptions) -> "PictureSettings":
        """Pick the groups out of a script's options."""
        return cls(options.prompt, options.picture, options.size)


def find_problems(options: SdxlGenImgOptions) -> Iterator[str]:
    """Tell what is wrong with the files a command line names and with what is in the prompts."""
    ckpt = options.model.ckpt
    checks: list[Callable[[], object]] = [
        lambda: None if ckpt is None else resolve_checkpoint(ckpt),
        lambda: read_prompts(options.prompt),
        lambda: planned_networks(options.network),
        lambda: planned_words(options.network),
        lambda: planned_controls(options.network),
    ]
    for check in checks:
        try:
            check()
        except UserError as error:
            yield from error.problems if isinstance(error, UsageError) else [str(error)]


def resolve_checkpoint(ckpt: str) -> str:
    """Return the path of the model: `ckpt` itself, or the one path it matches as a pattern.

    Raises:
        UserError: there is no such path, or the pattern matches several.
    """
    if Path(ckpt).exists():
        return ckpt
    matches = sorted(glob.glob(ckpt))
    if len(matches) == 1:
        return matches[0]
    if matches:
        shown = ", ".join(matches[:5])
        raise UserError(
            f"--ckpt {ckpt} matches {len(matches)} paths ({shown}{', …' if len(matches) > 5 else ''}); name one of them."
        )
    raise UserError(f"--ckpt {ckpt}: there is no such file or folder; check the path.")


def read_prompts(options: PromptOptions) -> list[LocatedPrompt]:
    """Read the prompts of `--from_file`, or else `--prompt`; none where there is neither.

    Raises:
        UsageError: the file has no prompt, or lines ask for something that cannot be drawn; all told together.
        UserError: the file is missing or is not UTF-8.
    """
    if options.from_file is None:
        prompts = [] if options.prompt is None else [locate_prompt(options.prompt, "--prompt")]
    else:
        text = read_prompt_text(options.from_file, "--from_file")
        prompts = [locate_prompt(line, where) for where, line in prompt_lines(options.from_file, text)]
        if not prompts:
            raise UsageError([f"{options.from_file}: there is no prompt in this file; write one per line."])
    raise_refusals(prompts)
    return prompts


def locate_prompt(raw: str, where: str) -> LocatedPrompt:
    """Take one line apart."""
    prompt = LocatedPrompt(where, raw, parse_prompt_line(raw, GENERATION, where))
    if dynamic := _DYNAMIC.search(raw):
        prompt.line.refusals.append(
            f'{where}: dynamic prompts ("{dynamic.group()}") are not available; write one line per variant.'
        )
    return prompt


def raise_refusals(prompts: Iterable[LocatedPrompt]) -> None:
    """Raise a UsageError that tells everything these prompts ask for and cannot have, if there is anything."""
    if refusals := [refusal for prompt in prompts for refusal in prompt.line.refusals]:
        raise UsageError(refusals)


def log_notes(prompts: Iterable[LocatedPrompt], settings: PictureSettings) -> None:
    """Log what the lines say that is not used, and sizes that are drawn otherwise."""
    for prompt in prompts:
        for note in prompt.line.notes:
            logger.warning(note)
        (width, height), (drawn_width, drawn_height) = _size(prompt, settings)
        if (width, height) != (drawn_width, drawn_height):
            logger.warning(
                f"{prompt.where}: {width}x{height} is drawn as {drawn_width}x{drawn_height}; "
                f"sides are multiples of {SIDE_STEP} pixels, at least {MIN_SIDE}."
            )


def plan_pictures(prompts: Sequence[LocatedPrompt], settings: PictureSettings) -> list[ImageRequest]:
    """Return every picture of a run in the order they are drawn: rounds, prompts, images of a prompt."""
    rounds, same, seed = settings.prompt.n_iter, settings.picture.iter_same_seed, settings.picture.seed
    series = SeedSeries(seed, len(prompts) * settings.prompt.images_per_prompt * (1 if same else rounds))
    first = [request for prompt in prompts for request in requests_of(prompt, settings, series)]
    if same:
        return first * rounds
    return first + [r for _ in range(rounds - 1) for prompt in prompts for r in requests_of(prompt, settings, series)]


def requests_of(prompt: LocatedPrompt, settings: PictureSettings, series: SeedSeries) -> list[ImageRequest]:
    """Return the images of one prompt. Seeds of its own are used one per image, the last one for all that follow."""
    values, picture = prompt.line.values, settings.picture
    width, height = _size(prompt, settings)[1]
    original, negative_original, crop = _size_conditioning(
        {**settings.size.model_dump(exclude_none=True), **values}, (width, height)
    )
    seeds = values.get("seeds", ())
    return [
        ImageRequest(
            prompt=prompt.line.prompt,
            negative_prompt=values.get("negative_prompt", ""),
            width=width,
            height=height,
            steps=values.get("sample_steps", picture.steps),
            cfg_scale=values.get("scale", picture.scale),
            seed=seeds[min(i, len(seeds) - 1)] if seeds else series.next(),
            sampler=picture.sampler,
            original_wh=original,
            negative_original_wh=negative_original,
            crop_top_left=crop,
            network_mul=values.get("network_mul"),
            raw_prompt=prompt.raw,
        )
        for i in range(settings.prompt.images_per_prompt)
    ]


def _size(prompt: LocatedPrompt, settings: PictureSettings) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return width and height as asked for, and as they are drawn."""
    width = prompt.line.values.get("width", settings.picture.W or DEFAULT_SIDE)
    height = prompt.line.values.get("height", settings.picture.H or DEFAULT_SIDE)
    return (width, height), (rounded_side(width), rounded_side(height))


def _size_conditioning(
    sizes: Mapping[str, Any], own: tuple[int, int]
) -> tuple[tuple[int, int] | None, tuple[int, int] | None, tuple[int, int]]:
    """Return the original size, the one told with the negative prompt (width, height; None: not given) and the crop (top, left)."""

    def pair(width_key: str, height_key: str, default: tuple[int, int]) -> tuple[int, int] | None:
        if width_key not in sizes and height_key not in sizes:
            return None
        return sizes.get(width_key, default[0]), sizes.get(height_key, default[1])

    original = pair("original_width", "original_height", own)
    negative = pair("original_width_negative", "original_height_negative", original or own)
    return original, negative, (sizes.get("crop_top", 0), sizes.get("crop_left", 0))


def batches(requests: Iterable[ImageRequest], batch_size: int) -> Iterator[list[ImageRequest]]:
    """Yield neighbouring requests that can be drawn together, up to `batch_size` of them."""
    for _, alike in groupby(requests, key=lambda request: request.batch_key):
        while batch := list(islice(alike, batch_size)):
            yield batch
