"""The learning rates of the parts that are trained, as far as the options alone tell them."""

from collections.abc import Collection, Iterator

from library.options.checks_optimizer import negative_rate_problems, one_rate_problems
from library.options.groups.optimizer import OptimizerOptions
from library.options.scripts import SdxlTrainNetworkOptions


def network_rates(options: SdxlTrainNetworkOptions) -> dict[str, float]:
    """Return the rates of the parts that a network is trained for, by the option that gives each; 0 freezes a part."""
    network, default = options.network, options.optimizer.learning_rate
    rates = {}
    if not network.network_train_text_encoder_only:
        rates["unet_lr"] = default if network.unet_lr is None else network.unet_lr
    if not network.network_train_unet_only and not options.cache.cache_text_encoder_outputs:
        for number, rate in enumerate(network.text_encoder_rates(), start=1):
            rates[f"text_encoder_lr{number}"] = default if rate is None else rate
    return rates


def rate_problems(optimizer: OptimizerOptions, rates: Collection[float]) -> list[str]:
    """Return why the optimizer cannot train parts with these rates, one sentence each."""
    return [*negative_rate_problems(optimizer, list(rates)), *one_rate_problems(optimizer, list(rates))]


def rate_notes(options: SdxlTrainNetworkOptions) -> Iterator[str]:
    """Yield a sentence where a part is left to the default rate while others were given theirs, or a rate is of a frozen part."""
    network, optimizer = options.network, options.optimizer
    own = {"unet_lr": network.unet_lr}
    own |= {f"text_encoder_lr{number}": rate for number, rate in enumerate(network.text_encoder_rates(), start=1)}
    trained = network_rates(options)
    given = {name: bool(getattr(network, name)) for name in ("unet_lr", "text_encoder_lr1", "text_encoder_lr2")}
    given["text_encoder_lr"] = any(network.text_encoder_lr or ())
    for name in sorted(name for name, is_given in given.items() if is_given):
        if not any(part.startswith(name) for part in trained):
            yield f"--{name} has no effect, because that part is not trained here."
    without = [name for name in trained if own[name] is None]
    if without and any(own.values()) and "learning_rate" not in optimizer.model_fields_set:
        yield (
            f"--{' and --'.join(without)} and --learning_rate are not given, so what they stand for trains at the default rate of "
            f"{optimizer.learning_rate}. Set one of them."
        )
