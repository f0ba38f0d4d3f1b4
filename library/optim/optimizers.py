"""From a name and its arguments to an optimizer."""

import importlib
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from library.optim.bits_and_bytes import step_in_place
from library.options.checks_optimizer import (
    class_path,
    did_you_mean_class,
    finds_its_rate,
    is_adafactor,
    missing_package,
    named_optimizer,
    negative_rate_problems,
    one_rate_problems,
    optimizer_arguments,
    optimizer_name,
    optimizer_problems,
    read_arguments,
    sets_its_own_rate,
    unknown_optimizer,
)
from library.options.errors import UsageError
from library.options.groups.optimizer import OptimizerOptions
from library.options.nearest import did_you_mean

logger = logging.getLogger(__name__)


def make_optimizer(options: OptimizerOptions, param_groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """Make the optimizer that was asked for.

    Args:
        options: name, arguments and learning rate.
        param_groups: what to train: `params` and, where a part has a rate of its own, `lr`; at least one parameter in all.

    Returns:
        The optimizer, in training mode where it has one. For Adafactor with relative steps the groups carry `--learning_rate` as
        `initial_lr`, the rate that is reported before the first update.

    Raises:
        UsageError: for unknown names and arguments, missing packages, and rates that the optimizer cannot use.
    """
    if problems := optimizer_problems(options):
        raise UsageError(problems)
    groups = [dict(group, params=list(group["params"])) for group in param_groups]
    if not any(group["params"] for group in groups):
        raise UsageError(
            ["There is nothing to train: every learning rate is 0 or every part is switched off. Give a rate above 0."]
        )
    rates = [group.get("lr", options.learning_rate) for group in groups]
    if problems := [*negative_rate_problems(options, rates), *one_rate_problems(options, rates)]:
        raise UsageError(problems)
    arguments, cls = optimizer_arguments(options), optimizer_class(options)
    rate: float | None = options.learning_rate
    if sets_its_own_rate(options):
        groups, rate = _without_rates(groups, options.learning_rate), None
    _check_arguments(cls, arguments)
    _log_advice(options, cls, groups, arguments)
    try:
        optimizer: torch.optim.Optimizer = cls(groups, **{"lr": rate, **arguments})
    except (TypeError, ValueError, AssertionError, AttributeError, NotImplementedError, RuntimeError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in {"lr": rate, **arguments}.items())
        raise UsageError(
            [f"{cls.__name__} does not accept its arguments ({given}): {error}. Change --optimizer_args or --learning_rate."]
        ) from error
    train_mode = getattr(optimizer, "train", None)
    if callable(train_mode):
        train_mode()
    choose_kernels(optimizer, next(p for group in groups for p in group["params"]).device.type)
    if cls.__module__.startswith("bitsandbytes."):
        step_in_place(optimizer)
    return optimizer


def choose_kernels(optimizer: torch.optim.Optimizer, device_type: str) -> None:
    """Let torch's Adam, AdamW and SGD step with their fused kernels on a GPU, unless the arguments chose others.

    They are as fast as torch's own choice there, `foreach`, and make no temporary copies of all parameters. They are chosen in the
    groups rather than at construction, after which a gradient scaler would leave it to the kernel to skip steps and not see it.

    Args:
        optimizer: just made.
        device_type: where the parameters are; "cpu" keeps torch's choice.
    """
    if device_type != "cuda" or not isinstance(optimizer, torch.optim.Adam | torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
            group["fused"] = True


def optimizer_class(options: OptimizerOptions) -> type[torch.optim.Optimizer]:
    """Import the optimizer's class.

    Raises:
        UsageError: if its package is missing or has no such class.
    """
    name = optimizer_name(options)
    module_name, _, class_name = class_path(options).rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError([missing_package(f"--optimizer_type {name}", str(error.name).partition(".")[0])]) from error
    cls = getattr(module, class_name, None)
    if cls is None and "." not in name:
        raise UsageError([unknown_optimizer(name)])
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        found = {key: value for key, value in vars(module).items() if isinstance(value, type) and key != "Optimizer"}
        classes = [key for key, value in found.items() if issubclass(value, torch.optim.Optimizer)]
        hint = did_you_mean_class(class_name, classes)
        raise UsageError(
            [f"--optimizer_type: {module_name} has no optimizer {class_name}.{hint} It has {', '.join(classes) or 'none'}."]
        )
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(
            [f"--optimizer_type {name} wants to evaluate the loss itself, several times a step, which training does not offer."]
        )
    return cls


def describe_optimizer(options: OptimizerOptions) -> str:
    """Return `module.Class(key=value,…)` as `ss_optimizer` of network files has it; without arguments there are no brackets."""
    cls, choice = optimizer_class(options), named_optimizer(options)
    given, _ = read_arguments(options.optimizer_args, "--optimizer_args")
    shown = {**given, **{key: optimizer_arguments(options)[key] for key in (choice.shown_defaults if choice else ())}}
    text = ",".join(f"{key}={value}" for key, value in shown.items())
    return f"{cls.__module__}.{cls.__qualname__}" + (f"({text})" if text else "")


def _without_rates(groups: list[dict[str, Any]], initial_rate: float) -> list[dict[str, Any]]:
    if any("lr" in group for group in groups):
        logger.warning(
            "Adafactor sets its own rate; rates of single parts are not used. --optimizer_args relative_step=False fixes the rate."
        )
    return [{**{key: value for key, value in group.items() if key != "lr"}, "initial_lr": initial_rate} for group in groups]


def _check_arguments(cls: type, arguments: Mapping[str, Any]) -> None:
    accepted = inspect.signature(cls).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values()):
        return
    names = [name for name in accepted if name not in ("params", "lr")]
    problems = [
        f"--optimizer_args: {cls.__name__} has no argument {key!r}.{did_you_mean(key, names)} It has {', '.join(names)}."
        for key in arguments
        if key not in names
    ]
    if problems:
        raise UsageError(problems)


def _log_advice(options: OptimizerOptions, cls: type, groups: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> None:
    choice = named_optimizer(options)
    if choice and choice.note:
        logger.warning(choice.note)
    if is_adafactor(options) and not sets_its_own_rate(options):
        if options.max_grad_norm:
            logger.warning("Adafactor clips its updates itself; --max_grad_norm 0 is advised with it.")
        if arguments.get("clip_threshold", 1.0) != 1.0:
            logger.warning("Adafactor works best with clip_threshold=1.0; it is %s.", arguments["clip_threshold"])
    if finds_its_rate(options):
        rates = {group.get("lr", options.learning_rate) for group in groups}
        if min(rates) <= 0.1:
            logger.warning(
                "%s finds the rate itself and multiplies it by the learning rate, here %s; 1.0 is advised.",
                cls.__name__,
                min(rates),
            )
