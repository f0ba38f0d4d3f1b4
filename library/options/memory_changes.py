"""Options that save memory on the device, in the order of what they cost in time; free of torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, TypeVar

from library.options.checks import find_problems
from library.options.checks_optimizer import class_path
from library.options.scripts import SdxlTrainNetworkOptions, SdxlTrainOptions, TrainingOptions

Options = TypeVar("Options", bound=TrainingOptions)


@dataclass(frozen=True)
class Change:
    """Some options that are given together."""

    flags: str
    """As they are typed."""
    cost: str
    """What they cost, for people."""
    values: Mapping[str, Mapping[str, Any]]
    """By attribute of the options and name."""
    saves: Mapping[str, float]
    """The most that they save: a share of each category of a forecast (`library.memory.trace`)."""
    suits: Callable[[TrainingOptions], bool]
    """Whether they would change something; whether they may be combined with the others is asked of the checks."""
    keeps_the_run: bool = True
    """Whether the same is trained of the same data, but for rounding, so that `--memory_budget` may pick them."""

    def applied(self, options: Options) -> Options:
        """Return the options with these."""
        return replace(
            options, **{group: getattr(options, group).model_copy(update=dict(new)) for group, new in self.values.items()}
        )


def _trains_texts(options: TrainingOptions) -> bool:
    if isinstance(options, SdxlTrainNetworkOptions):
        return not options.network.network_train_unet_only
    return not isinstance(options, SdxlTrainOptions) or options.finetune.train_text_encoder


def _can_cache_text(options: TrainingOptions) -> bool:
    return not _trains_texts(options) and options.cache.text is None and options.dataset.dataset_class is None


def _keeps_two_moments(options: TrainingOptions) -> bool:
    return class_path(options.optimizer) in ("torch.optim.AdamW", "torch.optim.Adam") and find_spec("bitsandbytes") is not None


def _is_frozen(options: TrainingOptions) -> bool:
    return not isinstance(options, SdxlTrainOptions)


def _computes_again(share: float) -> Callable[[TrainingOptions], bool]:
    def suits(options: TrainingOptions) -> bool:
        precision = options.precision
        return not precision.gradient_checkpointing or precision.checkpoint_fraction < share

    return suits


def _offloads(share: float) -> Callable[[TrainingOptions], bool]:
    def suits(options: TrainingOptions) -> bool:
        return not options.precision.blocks_to_swap and (options.precision.offload_fraction or 0) < share

    return suits


def _packs(kind: str) -> Callable[[TrainingOptions], bool]:
    def suits(options: TrainingOptions) -> bool:
        return (
            _is_frozen(options) and options.precision.denoiser_quant in (None, "fp8") and options.precision.denoiser_quant != kind
        )

    return suits


def _fused(*, keeps_the_run: bool) -> Change:
    return Change(
        "--fused_backward_pass",
        "no time; gradients are limited tensor by tensor",
        {"optimizer": {"fused_backward_pass": True}},
        {"gradients": 1, "activations": 1},
        lambda options: not _is_frozen(options) and not options.optimizer.fused_backward_pass,
        keeps_the_run,
    )


_CHECKPOINTING = {"gradient_checkpointing": True}
CHANGES: tuple[Change, ...] = (
    Change(
        "--cache_latents",
        "nothing: steps are faster",
        {"cache": {"cache_latents": True}},
        {"weights": 1, "activations": 1},
        lambda options: not options.cache.cache_latents and options.dataset.dataset_class is None,
        keeps_the_run=False,
    ),
    Change(
        "--cache_text_encoder_outputs",
        "nothing: steps are faster",
        {"cache": {"cache_text_encoder_outputs": True}},
        {"weights": 1, "activations": 1},
        _can_cache_text,
        keeps_the_run=False,
    ),
    Change(
        "--optimizer_type AdamW8bit",
        "no time; the optimizer's state is rounded to 8 bits",
        {"optimizer": {"optimizer_type": "AdamW8bit"}},
        {"optimizer": 0.75, "activations": 1},
        _keeps_two_moments,
    ),
    _fused(keeps_the_run=False),
    *(
        Change(
            "--gradient_checkpointing" + (f" --checkpoint_fraction {share:g}" if share < 1 else ""),
            f"about {share / 3:.0%} more time",
            {"precision": _CHECKPOINTING | {"checkpoint_fraction": share}},
            {"activations": 1},
            _computes_again(share),
        )
        for share in (0.5, 1.0)
    ),
    Change(
        "--optimizer_states host",
        "transfers of the optimizer's state in each update",
        {"optimizer": {"optimizer_states": "host"}},
        {"optimizer": 1, "activations": 1},
        lambda options: options.optimizer.optimizer_states == "device",
    ),
    _fused(keeps_the_run=True),  # for a budget not before the others, since it limits gradients in another way
    *(
        Change(
            f"--offload_fraction {share:g}",
            "transfers beside the computation",
            {"precision": {"offload_fraction": share}},
            {"weights": share, "gradients": 1, "optimizer": 1, "activations": 1},
            _offloads(share),
        )
        for share in (0.3, 0.6, 0.9)
    ),
    *(
        Change(
            f"--base_quant {kind}",
            f"unpacking at each use; frozen weights are rounded to {bits} bits",
            {"precision": {"base_quant": kind}},
            {"weights": 1 - bits / 16 + 0.03},
            _packs(kind),
        )
        for kind, bits in (("fp8", 8), ("nf4", 4))
    ),
)  # fmt: skip
"""The cheapest first."""


def levels(options: Options, *, keeps_the_run: bool) -> Iterator[tuple[Options, tuple[Change, ...]]]:
    """Yield the options with more and more changes, the cheapest first, and the changes that are in them.

    Args:
        options: as they were given.
        keeps_the_run: leave out changes that train something else.
    """
    chosen: tuple[Change, ...] = ()
    for change in CHANGES:
        if (keeps_the_run and not change.keeps_the_run) or not change.suits(options):
            continue
        more = without_covered(chosen, change)
        changed = with_changes(options, more)
        if changed != with_changes(options, chosen) and not find_problems(changed):
            chosen = tuple(more)
            yield changed, chosen


def without_covered(changes: Sequence[Change], change: Change) -> list[Change]:
    """Return changes and one more, without those that set nothing that it does not set."""
    return [*(each for each in changes if not _covers(change, each)), change]


def no_swapping(options: TrainingOptions) -> str | None:
    """Say in a sentence why blocks whose weights are trained cannot be swapped, although they are not yet; None where they can."""
    if not options.trains_denoiser or options.precision.swaps_blocks:
        return None
    swapped = options.precision.model_copy(update={"offload_fraction": 0.3})
    return next(iter(find_problems(replace(_fused(keeps_the_run=True).applied(options), precision=swapped))), None)


def with_changes(options: Options, changes: Sequence[Change]) -> Options:
    """Return the options with all changes."""
    for change in changes:
        options = change.applied(options)
    return options


def _covers(change: Change, other: Change) -> bool:
    """Say whether a change sets all that another one sets."""
    return all(set(new) <= set(change.values.get(group, ())) for group, new in other.values.items())
