"""Optimizers and learning-rate schedules by name, as data: what the checks know of them before torch is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OptimizerChoice:
    """One named optimizer."""

    name: str
    class_path: str
    """`package.module.Class`, imported when the optimizer is made."""
    pip: str | None = None
    """What `pip install` needs for it; None when the suite always has it."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments given unless `--optimizer_args` says otherwise."""
    shown_defaults: tuple[str, ...] = ()
    """Those of `defaults` that metadata lists among the arguments."""
    note: str | None = None
    """Something a person who chooses it should know; logged as a warning."""


def _bitsandbytes(name: str) -> OptimizerChoice:
    return OptimizerChoice(name, f"bitsandbytes.optim.{name}", "bitsandbytes")


def _dadaptation(name: str, class_path: str | None = None) -> OptimizerChoice:
    return OptimizerChoice(name, class_path or f"dadaptation.{name}", "dadaptation")


def _schedule_free(name: str) -> OptimizerChoice:
    return OptimizerChoice(name, f"schedulefree.{name}", "schedulefree")


_NESTEROV = {"nesterov": True, "momentum": 0.9}

_CHOICES = (
    OptimizerChoice("AdamW", "torch.optim.AdamW"),
    *map(_bitsandbytes, ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit", "PagedLion8bit")),
    OptimizerChoice("Lion", "lion_pytorch.Lion", "lion-pytorch"),
    OptimizerChoice("SGDNesterov", "torch.optim.SGD", defaults=_NESTEROV, shown_defaults=("momentum",)),
    OptimizerChoice(
        "SGDNesterov8bit",
        "bitsandbytes.optim.SGD8bit",
        "bitsandbytes",
        defaults=_NESTEROV,
        shown_defaults=("momentum",),
        note="bitsandbytes' 8-bit SGD takes plain momentum steps; --optimizer_type SGDNesterov takes Nesterov steps.",
    ),
    _dadaptation("DAdaptation", "dadaptation.experimental.DAdaptAdamPreprint"),
    _dadaptation("DAdaptAdamPreprint", "dadaptation.experimental.DAdaptAdamPreprint"),
    _dadaptation("DAdaptAdanIP", "dadaptation.experimental.DAdaptAdanIP"),
    *map(_dadaptation, ("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD")),
    OptimizerChoice("Prodigy", "prodigyopt.Prodigy", "prodigyopt"),
    OptimizerChoice(
        "Adafactor", "transformers.optimization.Adafactor", defaults={"relative_step": True}, shown_defaults=("relative_step",)
    ),
    *map(_schedule_free, ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")),
    OptimizerChoice("CAME", "pytorch_optimizer.CAME", "pytorch-optimizer"),
    OptimizerChoice("AdEMAMix", "pytorch_optimizer.AdEMAMix", "pytorch-optimizer"),
    OptimizerChoice("Muon", "library.optim.muon.MuonWithAdamW"),
)

OPTIMIZERS: Mapping[str, OptimizerChoice] = {choice.name.lower(): choice for choice in _CHOICES}
"""Named optimizers by their name in lower case."""

TORCH_OPTIMIZERS = ("ASGD", "Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
"""Further classes of torch.optim that a training loop can step, written exactly so; newer ones by their full path."""

FULL_PATHS: Mapping[str, str] = {
    name.lower(): f"{module}.{name}"
    for module, names in {
        "bitsandbytes.optim": ("AdEMAMix8bit", "PagedAdEMAMix8bit", "RMSprop8bit", "Adagrad8bit", "LAMB8bit", "LARS8bit"),
        "prodigyplus": ("ProdigyPlusScheduleFree",),
    }.items()
    for name in names
}
"""Optimizers people know by a short name that must be written in full; by that name in lower case."""

PIP_NAMES: Mapping[str, str] = {
    "pytorch_optimizer": "pytorch-optimizer",
    "lion_pytorch": "lion-pytorch",
    "prodigyplus": "prodigy-plus-schedule-free",
}
"""What `pip install` calls packages whose import name differs."""

SELF_TUNING = ("dadaptation.", "prodigyopt.", "prodigyplus.", "pytorch_optimizer.Prodigy", "pytorch_optimizer.DAdapt")
"""How the paths of optimizers begin that find the rate themselves; the learning rate is a factor on it and should be near 1."""

ONE_RATE = ("dadaptation.", "prodigyopt.")
"""Packages whose optimizers find one rate for all groups: they refuse groups with another factor on it, or do not look at it."""

UNCORRECTED = ("prodigyopt.Prodigy", "dadaptation.DAdaptAdam")
"""Optimizers that begin with steps of up to 6.5 times the rate they found, unless told `use_bias_correction=True`."""

STEPPED_ALONE = ("torch.optim.", "bitsandbytes.optim.", "lion_pytorch.", "transformers.optimization.", "library.optim.")
"""Packages whose optimizers step every parameter from that parameter alone. Those of others may look at all parameters at once, or
count steps for a whole group."""

STEPPED_TOGETHER = frozenset({"torch.optim.LBFGS"})
"""The exceptions among them."""


SCHEDULES: Mapping[str, tuple[str, ...]] = {
    "constant": (),
    "constant_with_warmup": (),
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": (),
    "polynomial": ("lr_end",),
    "inverse_sqrt": (),
    "cosine_with_min_lr": ("min_lr",),
    "warmup_stable_decay": ("warmup_type", "decay_type"),
    "piecewise_constant": ("step_rules",),
}
"""Schedules by name, each with what `--lr_scheduler_args` may set beside the options of its own."""

RAMP_SHAPES = ("linear", "cosine", "1-sqrt")
"""Shapes of the warm-up and of the decay of warmup_stable_decay."""

POLYNOMIAL_LR_END = 1e-7
"""Where polynomial ends unless `lr_end` says otherwise."""
