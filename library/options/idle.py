"""Options that do nothing because another one is missing, which are told so that nobody waits for their effect."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from library.options.checks_optimizer import is_schedule_free
from library.options.declare import OptionGroup
from library.options.groups.network import NetworkOptions
from library.options.groups.output import ModelOutputOptions
from library.options.groups.textual_inversion import TextualInversionOptions
from library.options.scripts import TrainingOptions

_SCHEDULES_OF = {
    "lr_scheduler_num_cycles": ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
    "lr_decay_steps": ("warmup_stable_decay",),
}
"""The schedules that read each option."""


@dataclass(frozen=True)
class _Need:
    """What some options of a group do nothing without."""

    group: str
    names: tuple[str, ...]
    what: str
    is_met: Callable[[TrainingOptions], bool]


def _saves_epochs(options: TrainingOptions) -> bool:
    return bool(options.output.save_every_n_epochs or options.output.save_n_epoch_ratio)


def _draws(options: TrainingOptions) -> bool:
    sample = options.sample
    return sample.sample_at_first or max(sample.sample_every_n_steps or 0, sample.sample_every_n_epochs or 0) > 0


def _keeps_caches(options: TrainingOptions) -> bool:
    text = options.cache.text
    return options.cache.cache_latents_to_disk or (text is not None and text.cache_text_encoder_outputs_to_disk)


def _tracks(options: TrainingOptions) -> bool:
    return options.logging.log_with is not None or options.logging.logging_dir is not None


_NEEDS = (
    _Need("output", ("save_last_n_epochs",), "--save_every_n_epochs", _saves_epochs),
    _Need("output", ("save_last_n_steps",), "--save_every_n_steps", lambda options: bool(options.output.save_every_n_steps)),
    _Need(
        "output",
        ("save_last_n_epochs_state",),
        "--save_state and --save_every_n_epochs",
        lambda options: options.state.save_state and _saves_epochs(options),
    ),
    _Need(
        "output",
        ("save_last_n_steps_state",),
        "--save_state and --save_every_n_steps",
        lambda options: options.state.save_state and bool(options.output.save_every_n_steps),
    ),
    _Need("state", ("resume_changed",), "--resume", lambda options: bool(options.state.resume)),
    _Need(
        "sample",
        ("sample_prompts", "sample_sampler"),
        "--sample_every_n_epochs, --sample_every_n_steps or --sample_at_first",
        _draws,
    ),
    _Need("cache", ("highvram",), "--cache_latents", lambda options: options.cache.cache_latents),
    _Need(
        "cache",
        ("text_cache_variants",),
        "--cache_text_encoder_outputs",
        lambda options: options.cache.text is not None,
    ),
    _Need(
        "cache",
        ("skip_cache_check",),
        "--cache_latents_to_disk or --cache_text_encoder_outputs_to_disk",
        _keeps_caches,
    ),
    _Need("logging", ("log_prefix",), "--logging_dir", lambda options: options.logging.logging_dir is not None),
    _Need("logging", ("log_tracker_name", "log_tracker_config", "log_config"), "--logging_dir or --log_with", _tracks),
    _Need(
        "logging",
        ("log_grad_norm",),
        "--logging_dir, --log_with or --log_events",
        lambda options: _tracks(options) or options.logging.log_events is not None,
    ),
    _Need(
        "logging",
        ("wandb_run_name", "wandb_api_key"),
        "--log_with wandb or all",
        lambda options: options.logging.log_with in ("wandb", "all"),
    ),
)


def idle_notes(options: TrainingOptions) -> Iterator[str]:
    """Yield a sentence for each option that was given and does nothing beside the others."""
    for need in _NEEDS:
        group: OptionGroup = getattr(options, need.group)
        if not need.is_met(options):
            yield from (f"--{name} has no effect without {need.what}." for name in need.names if _differs(group, name))
    if options.output.save_every_n_epochs and options.output.save_n_epoch_ratio:
        yield "--save_every_n_epochs has no effect beside --save_n_epoch_ratio, which replaces it."
    if min(options.sample.sample_every_n_steps or 0, options.sample.sample_every_n_epochs or 0) > 0:
        yield "--sample_every_n_steps has no effect beside --sample_every_n_epochs, which replaces it."
    if options.length.max_train_epochs is not None and _differs(options.length, "max_train_steps"):
        yield "--max_train_steps has no effect beside --max_train_epochs, which replaces it."
    yield from _schedule_notes(options)


def network_notes(network: NetworkOptions) -> Iterator[str]:
    """Yield a sentence for each option of a network that another one replaces."""
    if network.dim_from_weights:
        for name in ("network_dim", "network_alpha"):
            if _differs(network, name):
                yield f"--{name} has no effect beside --dim_from_weights, which takes it from the file."


def word_notes(word: TextualInversionOptions) -> Iterator[str]:
    """Yield that nothing is copied for a word that is read from a file."""
    if word.weights is not None and word.init_word is not None:
        yield "--init_word has no effect beside --weights, whose word is learned on."


def folder_notes(output: ModelOutputOptions) -> Iterator[str]:
    """Yield that `--use_safetensors` says nothing where no diffusers folder is written that could have other files."""
    if output.use_safetensors and output.save_model_as != "diffusers":
        yield f"--use_safetensors has no effect: it is for --save_model_as diffusers, and models are saved as {output.layout}."


def _schedule_notes(options: TrainingOptions) -> Iterator[str]:
    schedule = options.scheduler
    if is_schedule_free(options.optimizer):  # of the whole schedule it is told elsewhere that it is ignored
        return
    given = [name for name in _SCHEDULES_OF if _differs(schedule, name)]
    if schedule.lr_scheduler_type:
        given += ["lr_scheduler"] * _differs(schedule, "lr_scheduler")
        yield from (f"--{name} has no effect beside --lr_scheduler_type, which replaces it." for name in given)
        return
    for name in given:
        if schedule.lr_scheduler not in _SCHEDULES_OF[name]:
            yield f"--{name} has no effect with --lr_scheduler {schedule.lr_scheduler}; it is for {', '.join(_SCHEDULES_OF[name])}."


def _differs(group: OptionGroup, name: str) -> bool:
    return name in type(group).model_fields and bool(getattr(group, name) != type(group).model_fields[name].default)
