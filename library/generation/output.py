"""Files of drawn pictures: PNGs with names that never overwrite, and with the text other programs read."""

import json
from datetime import datetime
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.diffusion.samplers import SAMPLERS
from library.files.atomic import atomic_write
from library.generation.request import ImageRequest


class PictureFiles:
    """A folder that pictures are written to.

    Names are `im_<time>_<place in the batch>_<seed>.png`, or `im_000001.png`, `im_000002.png`, … counted on from what the folder
    holds.

    Args:
        folder: made when the first picture is written.
        sequential: count instead of naming by time and seed.
        model_name: what the metadata calls the model.
    """

    def __init__(self, folder: str, *, sequential: bool, model_name: str) -> None:
        self._folder = Path(folder)
        self._sequential = sequential
        self._count = _highest_number(self._folder) if sequential else 0
        self._model_name = model_name

    def save(self, picture: Image.Image, request: ImageRequest, place: int, now: datetime, networks: dict[str, float]) -> Path:
        """Write one picture, whole or not at all, under a name that is free.

        Args:
            picture: as drawn.
            request: what was asked for; goes into the file.
            place: position in the batch, from 0.
            now: local time.
            networks: name and strength of each network it was drawn with.

        Raises:
            UserError: the disk is full or the folder cannot be written to.
        """
        path = self._free_path(request, place, now)
        with atomic_write(path) as temporary:
            picture.save(temporary, format="PNG", pnginfo=self._metadata(picture, request, networks))
        return path

    def _free_path(self, request: ImageRequest, place: int, now: datetime) -> Path:
        if self._sequential:
            self._count += 1
            return self._folder / f"im_{self._count:06d}.png"
        stem = f"im_{now:%Y%m%d%H%M%S}_{place:03d}_{request.seed}"
        path, copy = self._folder / f"{stem}.png", 1
        while path.exists():
            copy += 1
            path = self._folder / f"{stem}_{copy}.png"
        return path

    def _metadata(self, picture: Image.Image, request: ImageRequest, networks: dict[str, float]) -> PngInfo:
        info = PngInfo()
        for key, value in png_fields(request).items():
            info.add_text(key, value)
        info.add_text("parameters", parameters_text(request, picture.size, self._model_name, networks))
        return info


def _highest_number(folder: Path) -> int:
    """Return the highest number of `im_000001.png` and its like in the folder; 0 where there is none."""
    numbers = [path.stem.removeprefix("im_") for path in folder.glob("im_*.png")]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def png_fields(request: ImageRequest) -> dict[str, str]:
    """Return the text chunks that sd-scripts writes, in its order; a size that was not given reads `None`."""
    width, height = request.original_wh or (request.width, request.height)
    negative_width, negative_height = request.negative_original_wh or (None, None)
    return {
        "prompt": request.prompt,
        "seed": str(request.seed),
        "sampler": request.sampler,
        "steps": str(request.steps),
        "scale": str(request.cfg_scale),
        "negative-prompt": request.negative_prompt,
        "raw-prompt": request.raw_prompt,
        "original-height": str(height),
        "original-width": str(width),
        "original-height-negative": str(negative_height),
        "original-width-negative": str(negative_width),
        "crop-top": str(request.crop_top_left[0]),
        "crop-left": str(request.crop_top_left[1]),
    }


def parameters_text(request: ImageRequest, size: tuple[int, int], model_name: str, networks: dict[str, float]) -> str:
    """Return the text of the chunk `parameters`, which web user interfaces and galleries read.

    The prompt, a line with the negative prompt if there is one, and a line of `Key: value` pairs; a value with a comma, a colon
    or a line break is written as a JSON string.

    Args:
        request: what was asked for.
        size: width and height of the picture in pixels.
        model_name: the checkpoint's name.
        networks: name and strength of each network.
    """
    fields = {
        "Steps": request.steps,
        "Sampler": SAMPLERS[request.sampler].title,
        "CFG scale": f"{request.cfg_scale:g}",
        "Seed": request.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": model_name,
        "Networks": ", ".join(f"{name}: {strength:g}" for name, strength in networks.items()),
        "RNG": "CPU",
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in fields.items() if value != ""))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(",:\n") else value
