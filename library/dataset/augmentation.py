"""What chance changes of a picture besides mirroring it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ColorChange:
    """A small change of colour: of the hue or of the brightness curve, never of both."""

    hue_shift: float = 0.0
    """In units of two degrees, of which the colour circle has 180."""
    gamma: float = 1.0
    """Exponent of the pixel values, which lie in [0, 1]."""
