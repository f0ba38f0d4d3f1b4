"""Options about the optimizer."""

from typing import Annotated, ClassVar, Literal

from library.options.declare import OptionGroup, SameAsUnset, flag, option


class OptimizerOptions(OptionGroup):
    """Which optimizer, its arguments and rate."""

    topic: ClassVar[str] = "Optimizer"

    optimizer_type: str = option(
        "",
        "AdamW (when left out), AdamW8bit, Adafactor, Lion, Prodigy, AdamWScheduleFree, CAME, AdEMAMix, Muon or another of "
        "docs/optimizers.md; or package.module.Class.",
    )
    optimizer_args: tuple[str, ...] | None = option(None, "Arguments of the optimizer, each key=value with a Python literal.")
    use_8bit_adam: bool = flag("Old spelling of --optimizer_type AdamW8bit.")
    use_lion_optimizer: bool = flag("Old spelling of --optimizer_type Lion.")
    learning_rate: float = option(2e-6, "Learning rate of everything that has no rate of its own.")
    max_grad_norm: float = option(
        1.0,
        "Largest norm of all gradients together, or of each tensor's gradient where a fused option steps it in the backward pass; "
        "larger ones are scaled down. 0 switches it off.",
        ge=0,
    )
    on_non_finite: Literal["stop", "skip"] = option(
        "stop",
        "What to do when a loss or a gradient is not finite: stop and tell why, or tell, leave out that update and go on.",
    )
    optimizer_states: Literal["device", "host"] = option(
        "device", "Where the optimizer's state lies: host is main memory, from which each part comes for its step."
    )
    fused_backward_pass: bool = flag("Step each parameter inside the backward pass and free its gradient at once.")
    fused_optimizer_groups: Annotated[int | None, SameAsUnset(0)] = option(
        None,
        "Cut the trained tensors into about N groups and step each as soon as its gradients are there; 4 to 10 are good.",
        ge=1,
    )
