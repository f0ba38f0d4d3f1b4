"""Which images are held out of training to measure the loss on: a function of a seed and of the images' names alone."""

import hashlib
import os
from collections.abc import Sequence


def num_held_out(count: int, share: float) -> int:
    """Return how many of `count` images are held out: the share of them, rounded, but one at least and never all.

    Args:
        count: images there are.
        share: 0 holds out nothing, not even one.
    """
    if share <= 0 or count < 2:
        return 0
    return min(max(1, round(count * share)), count - 1)


def held_out(paths: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """Choose the images of a subset that are held out; the others are trained on.

    Images are ranked by a hash of the seed and of their folder's and own name, and the first are held out. So the choice is the
    same wherever the folder lies and at whatever size it is trained, and images that are added later move few others.

    Args:
        paths: the images of the subset, each once.
        share: of them that is held out, from 0 to 1.
        seed: other seeds hold out other images.
    """
    chosen = num_held_out(len(paths), share)
    if not chosen:
        return frozenset()
    folders = {folder: os.path.basename(os.path.realpath(folder)) for folder in {os.path.dirname(path) for path in paths}}
    ranked = sorted(paths, key=lambda path: (_rank(seed, folders[os.path.dirname(path)], os.path.basename(path)), path))
    return frozenset(ranked[:chosen])


def _rank(seed: int, folder: str, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{folder}\0{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
