"""Which of a model's blocks lie in main memory: those that leave the most room, spread over the forward pass."""

from collections.abc import Sequence

from library.options.errors import UserError

_NEARLY = 0.05
"""Share of the room that is given up for fewer bytes to move."""


def choose(sizes: Sequence[int], count: int, places: int) -> list[int]:
    """Return the numbers of the blocks that leave nearly the most room on the device for the fewest bytes to move, in their order.

    Room is the size of all of them less the places they take turns in, each as large as the largest: so a few very large blocks
    stay where smaller ones need smaller places. Among blocks of one size they are spread evenly, so that others compute while one
    is on its way.

    Args:
        sizes: bytes of each block, in the order of the forward pass.
        count: how many; 1 … the number of blocks.
        places: blocks that are on the device at a time.
    """
    ceilings = [size for size in sorted(set(sizes)) if sum(each <= size for each in sizes) >= count]
    moved = {ceiling: sum(_largest(sizes, count, ceiling)) for ceiling in ceilings}
    room = {ceiling: moved[ceiling] - places * ceiling for ceiling in ceilings}
    enough = max(room.values()) - _NEARLY * abs(max(room.values()))
    taken = _largest(sizes, count, next(ceiling for ceiling in ceilings if room[ceiling] >= enough))
    smallest = taken[-1]
    sure = [number for number, size in enumerate(sizes) if smallest < size <= taken[0]]
    equal = [number for number, size in enumerate(sizes) if size == smallest]
    return sorted([*sure, *_spread(equal, count - len(sure))])


def count_for_share(sizes: Sequence[int], total: int, share: float, places: int) -> int:
    """Return the least number of blocks that hold a share of a model's weights.

    Args:
        sizes: bytes of each block.
        total: bytes of the whole model.
        share: of `total`, above 0.
        places: see `choose`.

    Raises:
        UserError: all blocks together hold less.
    """
    for count in range(1, len(sizes) + 1):
        if sum(sizes[number] for number in choose(sizes, count, places)) >= share * total:
            return count
    most = int(100 * sum(sizes) / total) / 100
    raise UserError(
        f"--offload_fraction {share}: only {most} of the weights are in blocks that can be swapped. Give at most {most}."
    )


def check_count(count: int, blocks: int, places: int) -> None:
    """Refuse numbers of blocks of which there are too few, or that all fit in the places on the device.

    Raises:
        UserError: naming what is allowed.
    """
    if count > blocks:
        raise UserError(f"--blocks_to_swap {count}: the model has {blocks} blocks that can be swapped. Give at most {blocks}.")
    if count <= places:
        raise UserError(
            f"{count} of the model's blocks would be swapped, but {places} are on the device at any time, so nothing would be "
            f"saved. Give --blocks_to_swap {places + 1} or more."
        )


def _largest(sizes: Sequence[int], count: int, ceiling: int) -> list[int]:
    """Return the `count` largest sizes up to a ceiling, the largest first."""
    return sorted((size for size in sizes if size <= ceiling), reverse=True)[:count]


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    return [numbers[(2 * index + 1) * len(numbers) // (2 * count)] for index in range(count)]
