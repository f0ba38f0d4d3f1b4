"""What block swapping cannot be used with; nothing here needs torch."""

from collections.abc import Iterator

from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions


def swap_problems(precision: StepPrecisionOptions) -> Iterator[str]:
    """Yield that the number of blocks to swap was given in two ways."""
    if precision.blocks_to_swap and precision.offload_fraction:
        yield "--blocks_to_swap and --offload_fraction both say how many blocks are kept in main memory. Give one of them."


def trained_swap_problems(precision: StepPrecisionOptions, optimizer: OptimizerOptions) -> Iterator[str]:
    """Yield why blocks cannot be swapped whose own weights are trained."""
    if precision.swaps_blocks and not optimizer.fused_backward_pass:
        yield (
            f"{swap_flag(precision)} takes blocks off the accelerator as soon as their backward pass is over, so their weights "
            "have to be stepped in it: add --fused_backward_pass."
        )


def swap_flag(precision: StepPrecisionOptions) -> str:
    """Return the option that was given."""
    return "--blocks_to_swap" if precision.blocks_to_swap else "--offload_fraction"
