"""Which optimizers can be traced with fake tensors, and the state of those that cannot but are known; free of torch."""

from collections.abc import Mapping

from library.options.checks_optimizer import class_path, optimizer_name
from library.options.groups.optimizer import OptimizerOptions

KEPT_BY_BITSANDBYTES: Mapping[str, tuple[int, int]] = {
    f"bitsandbytes.optim.{name}": kept
    for names, kept in (
        (("AdamW8bit", "PagedAdamW8bit"), (2, 8)),
        (("PagedAdamW", "PagedAdamW32bit"), (2, 32)),
        (("Lion8bit", "PagedLion8bit", "SGD8bit"), (1, 8)),
        (("AdEMAMix8bit", "PagedAdEMAMix8bit"), (3, 8)),
    )
    for name in names
}
"""Values kept for each element of a parameter, and the bits of each, by class; their kernels want real tensors."""

ADAFACTOR = "transformers.optimization.Adafactor"
"""Traced without `scale_parameter`, which looks at values and keeps nothing."""

_TRACED = ("torch.optim.", "lion_pytorch.", "schedulefree.", ADAFACTOR)
_LOOK_AT_VALUES = frozenset(f"torch.optim.{name}" for name in ("ASGD", "Adafactor", "LBFGS", "SparseAdam"))

_SMALLEST_IN_8BIT = 4096
"""bitsandbytes keeps the state of smaller tensors in float32."""
_BLOCK_OF_8BIT = 256
"""Elements that share a float32 scale."""


def untraceable(options: OptimizerOptions) -> str | None:
    """Say in a sentence why the memory of a step cannot be forecast; None where it can."""
    path = class_path(options)
    if path in KEPT_BY_BITSANDBYTES or (path.startswith(_TRACED) and path not in _LOOK_AT_VALUES):
        return None
    return (
        f"The memory of {optimizer_name(options)} cannot be forecast: its step depends on values, or needs real tensors. "
        "Measure it, or forecast another --optimizer_type, such as AdamW, AdamW8bit or Adafactor."
    )


def kept_bytes(elements: int, moments: int, bits: int) -> int:
    """Return the bytes of bitsandbytes' state of one tensor; in 8 bits it is block-wise (Dettmers et al. 2022).

    Args:
        elements: of the tensor.
        moments: how many values the optimizer keeps of each.
        bits: of each value.
    """
    if bits == 32 or elements < _SMALLEST_IN_8BIT:
        return 4 * moments * elements
    return moments * (elements + 4 * -(-elements // _BLOCK_OF_8BIT))
