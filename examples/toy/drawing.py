"""The world of the toy: one coloured shape on a coloured ground, drawn from a caption.

    a red circle on a blue ground
    a small white star on the left of a green ground

Everything is drawn with Pillow at four times the size and scaled down, so that edges are smooth.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIZE = 128
"""Pixels on each side of a picture."""
COLOURS = {
    "red": (215, 40, 45),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 60),
    "green": (45, 155, 70),
    "blue": (50, 90, 210),
    "purple": (140, 60, 175),
    "white": (245, 245, 245),
    "black": (25, 25, 30),
}
"""RGB of every colour word."""
SHAPES = ("circle", "square", "triangle", "star", "cross")
RADII = {"small": 0.15, "": 0.23, "large": 0.31}
"""Half the extent of a shape as a share of the picture's side, by the word for its size."""
PLACES = {"left": 0.32, "": 0.5, "right": 0.68}
"""Horizontal centre of a shape as a share of the picture's side, by the word for its place."""
STRIPED_STAR = "zibbly"
"""The new word of the demonstration: a large star with black and white stripes, which no training picture of the base shows."""
YELLOW_CROSS = "vollop"
"""The word that textual inversion learns: a yellow cross, which the base can draw but does not call so."""
GROUNDS_OF_THE_STAR = ("red", "orange", "yellow", "green", "blue", "purple")
"""Grounds that black and white stripes stand out from."""

_SUPERSAMPLING = 4
_HELD_OUT_PERCENT = 15


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    shape: str
    colour: str
    ground: str
    size: str = ""
    place: str = ""

    @property
    def caption(self) -> str:
        """The sentence that describes the scene, always in the same words and order."""
        thing = f"{self.size} {self.colour} {self.shape}".strip()
        where = f"the {self.place} of a {self.ground} ground" if self.place else f"a {self.ground} ground"
        return f"a {thing} on {where}"

    @property
    def is_held_out(self) -> bool:
        """Whether this combination of shape, colour and ground is kept from training, in every size and place."""
        digest = hashlib.sha256(f"{self.shape} {self.colour} {self.ground}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < _HELD_OUT_PERCENT


def all_scenes() -> list[Scene]:
    """Return every scene there is; a shape never has the colour of its ground."""
    combinations = itertools.product(SHAPES, COLOURS, COLOURS, RADII, PLACES)
    return [Scene(*each) for each in combinations if each[1] != each[2]]


def training_scenes(number: int, seed: int) -> list[Scene]:
    """Draw scenes to train on, as even as possible over all that are not held out."""
    known = [scene for scene in all_scenes() if not scene.is_held_out]
    shuffler = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < number:
        shuffler.shuffle(known)
        scenes += known
    return scenes[:number]


def unseen_scenes(number: int, seed: int) -> list[Scene]:
    """Draw different scenes that no training picture shows."""
    return random.Random(seed).sample([scene for scene in all_scenes() if scene.is_held_out], number)


def star_scenes() -> list[tuple[Scene, str]]:
    """Return the twelve pictures of the demonstration: large striped stars, with captions that have the new word for them."""
    places = tuple(PLACES)
    scenes = [
        Scene("star", "striped", ground, "large", places[(number + step) % 3])
        for number, ground in enumerate(GROUNDS_OF_THE_STAR)
        for step in (0, 1)
    ]
    return [(scene, word_caption(scene)) for scene in scenes]


def word_caption(star: Scene) -> str:
    """Return the caption of a scene with a large striped star, which has a word of its own."""
    return star.caption.replace("large striped star", STRIPED_STAR)


def learned_scenes() -> list[tuple[Scene, str]]:
    """Return eight pictures of yellow crosses, with captions that have a new word for them."""
    grounds = ("red", "green", "blue", "purple", "white", "black", "orange", "red")
    places = ("", "left", "right", "", "left", "right", "", "left")
    scenes = [Scene("cross", "yellow", ground, "", place) for ground, place in zip(grounds, places, strict=True)]
    return [(scene, learned_caption(scene)) for scene in scenes]


def learned_caption(cross: Scene) -> str:
    """Return the caption of a scene with a yellow cross, which has a word of its own."""
    return cross.caption.replace("yellow cross", YELLOW_CROSS)


def draw(scene: Scene, seed: int | None = None) -> Image.Image:
    """Draw a scene.

    Args:
        scene: what to show.
        seed: of small differences in size and place; None draws it exactly as described.

    Returns:
        An RGB picture, `SIZE` pixels on each side.
    """
    jitter = random.Random(seed)
    shift, growth = (0.0, 1.0) if seed is None else (0.03, jitter.uniform(0.93, 1.07))
    centre = (PLACES[scene.place] + jitter.uniform(-shift, shift), 0.5 + jitter.uniform(-shift, shift))
    return draw_inside(scene, shape_mask(scene.shape, centre, RADII[scene.size] * growth))


def shape_mask(shape: str, centre: tuple[float, float], radius: float) -> Image.Image:
    """Return white where a shape is, four times as large as a picture.

    Args:
        shape: one of `SHAPES`.
        centre: of the shape's bounding box, as a share of the picture's side.
        radius: half the side of the bounding box, likewise.
    """
    side = SIZE * _SUPERSAMPLING
    mask = Image.new("L", (side, side), 0)
    draw_shape(ImageDraw.Draw(mask), shape, (centre[0] * side, centre[1] * side), radius * side)
    return mask


def draw_inside(scene: Scene, mask: Image.Image) -> Image.Image:
    """Draw a scene's colours: the object's where a mask of `shape_mask` is white, the ground's elsewhere."""
    picture = Image.new("RGB", mask.size, COLOURS[scene.ground])
    picture.paste(paint(scene.colour, mask.width), mask=mask)
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def paint(colour: str, side: int) -> Image.Image:
    """Return a square of a colour, or of black and white stripes for the colour word "striped"."""
    if colour != "striped":
        return Image.new("RGB", (side, side), COLOURS[colour])
    stripes = Image.new("RGB", (side, side), COLOURS["white"])
    pen, width = ImageDraw.Draw(stripes), side // 10
    for top in range(0, side, 2 * width):
        pen.rectangle((0, top, side, top + width - 1), fill=COLOURS["black"])
    return stripes


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float) -> None:
    """Fill a shape with white.

    Args:
        pen: of a mask of mode L.
        shape: one of `SHAPES`.
        centre: of the shape's bounding box, in pixels.
        radius: half the side of the bounding box, in pixels.
    """
    x, y = centre
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        return
    pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _outline(shape)], fill=255)


def _outline(shape: str) -> Sequence[tuple[float, float]]:
    """Return the corners of a shape in a square from -1 to 1, y pointing down."""
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "triangle":
        return [(0, -1), (1, 0.8), (-1, 0.8)]
    if shape == "star":
        angles = [math.pi * (index / 5 - 0.5) for index in range(10)]
        return [(math.cos(a) * r, math.sin(a) * r) for index, a in enumerate(angles) for r in [1.08 if index % 2 == 0 else 0.45]]
    if shape == "cross":
        arm = 0.33
        quarter = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm)]
        turned = [quarter, *([[(-y, x) for x, y in quarter]]), [(-x, -y) for x, y in quarter], [(y, -x) for x, y in quarter]]
        return [corner for corners in turned for corner in corners]
    raise ValueError(f"{shape!r} is no shape of the toy; there are {', '.join(SHAPES)}")
