"""The seeds of a run's pictures."""

import random

MAX_SEED = 2**31 - 1


class SeedSeries:
    """Seeds for one picture after another.

    With a seed S they are the whole numbers 0 … 2³¹ − 1 that Python's generator seeded with S gives, so a command line repeats its
    pictures; a run of a single picture takes S itself. Without one they are unpredictable.

    Args:
        seed: `--seed`, or None.
        num_pictures: how many the run will draw as far as is known; 0 when prompts are asked for one by one.
    """

    def __init__(self, seed: int | None, num_pictures: int) -> None:
        self._random = random.SystemRandom() if seed is None else random.Random(seed)
        self._only = seed if num_pictures == 1 else None

    def next(self) -> int:
        """Return the next picture's seed."""
        if self._only is not None:
            seed, self._only = self._only, None
            return seed
        return self._random.randint(0, MAX_SEED)
