"""What a trained network file says about itself: the `ss_*` keys that viewers and user interfaces read.

All values are strings, as safetensors wants them; an option that is not set is the string "None". Nothing here looks at a clock, a
random generator or an options object: what is recorded comes in as arguments.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from library.files.hashes import model_hash, sha256_file
from library.files.remembered import remembered_hash
from library.options.groups.network import NetworkOptions
from library.training.environment import source_revision

Metadata = dict[str, str]

RECORDED_OPTIONS: tuple[str, ...] = (
    "learning_rate", "unet_lr", "gradient_checkpointing", "gradient_accumulation_steps", "lr_warmup_steps", "lr_scheduler",
    "network_module", "network_dropout", "mixed_precision", "full_fp16", "clip_skip", "max_token_length", "cache_latents", "lowram",
    "noise_offset", "multires_noise_iterations", "multires_noise_discount", "adaptive_noise_scale", "zero_terminal_snr",
    "training_comment", "max_grad_norm", "caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate",
    "face_crop_aug_range", "prior_loss_weight", "min_snr_gamma", "scale_weight_norms", "ip_noise_gamma",
    "noise_offset_random_strength", "ip_noise_gamma_random_strength", "loss_type", "huber_schedule", "huber_scale", "huber_c",
    "fp8_base", "fp8_base_unet", "validation_seed", "validation_split", "max_validation_steps", "validate_every_n_epochs",
    "validate_every_n_steps", "resize_interpolation",
)  # fmt: skip
"""Options written as they were given, as `ss_<option>`."""

RECORDED_WHEN_SET: Mapping[str, Any] = {
    "timestep_distribution": "uniform",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "masked_loss_normalize": False,
    "ema_decay": None,
    "base_quant": None,
}
"""Options that sd-scripts does not have, written where their value is another than this default."""

MINIMAL_KEYS = frozenset(
    {"ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"}
)
"""What stays with `--no_metadata`: without these a file is hidden or taken for another model's by user interfaces."""

_COMMENT = "ss_training_comment"


@dataclass(frozen=True)
class RunRecord:
    """The facts of one run that no option tells."""

    session_id: int
    """Random per run; it groups the files that one run wrote."""
    started_at: float
    """Unix time in seconds."""
    seed: int
    """The seed in use, drawn where none was given."""
    num_train_images: int
    """Images times repeats."""
    num_reg_images: int
    num_validation_images: int
    batches_per_epoch: int
    """Batches of one process."""
    num_epochs: int
    total_updates: int
    optimizer: str
    """`module.Class(argument=value,…)`, as `library.optim.optimizers.describe_optimizer` gives it."""


@dataclass(frozen=True)
class NetworkRecord:
    """What a network file says of its own network."""

    dim: str
    """The rank in use; "Dynamic" where modules differ."""
    alpha: str
    args: Mapping[str, str | float | None] | None
    """The pairs of `--network_args`, None where it was not given."""
    text_encoder_lr: str
    """One rate for both text encoders, a list where they differ, "None" where unset."""


def network_metadata(
    values: Mapping[str, Any], run: RunRecord, network: NetworkRecord, dataset_facts: Mapping[str, Any], source: Mapping[str, str]
) -> Metadata:
    """Build the `ss_*` keys that stay the same for a whole run of network training.

    Args:
        values: every option of the script by its name.
        run: the facts of the run.
        network: the network's rank, alpha and arguments.
        dataset_facts: `ss_*` keys from the dataset; dicts and lists become JSON.
        source: which models the network fits, as the family says it, and name and hash keys of the base model and VAE, see
            `source_names` and `hash_sources`.

    Returns:
        All keys but those of `at_save`.

    Raises:
        KeyError: `values` lacks an option of `RECORDED_OPTIONS`.
    """
    metadata = {f"ss_{name}": str(values[name]) for name in RECORDED_OPTIONS}
    metadata |= {f"ss_{name}": str(values[name]) for name, default in RECORDED_WHEN_SET.items() if values[name] != default}
    metadata |= _run_keys(run)
    metadata |= {
        "ss_output_name": str(values["output_name"]),
        "ss_text_encoder_lr": network.text_encoder_lr,
        "ss_debiased_estimation": str(values["debiased_estimation_loss"]),
        "ss_network_dim": network.dim,
        "ss_network_alpha": network.alpha,
        "ss_sd_scripts_commit_hash": source_revision(),
    }
    if network.args is not None:
        metadata["ss_network_args"] = json.dumps(dict(network.args))
    metadata |= {key: _text(value) for key, value in dataset_facts.items()}
    return metadata | dict(source)


def _run_keys(run: RunRecord) -> Metadata:
    return {
        "ss_session_id": str(run.session_id),
        "ss_training_started_at": str(run.started_at),
        "ss_seed": str(run.seed),
        "ss_num_train_images": str(run.num_train_images),
        "ss_num_reg_images": str(run.num_reg_images),
        "ss_num_validation_images": str(run.num_validation_images),
        "ss_num_batches_per_epoch": str(run.batches_per_epoch),
        "ss_num_epochs": str(run.num_epochs),
        "ss_max_train_steps": str(run.total_updates),
        "ss_optimizer": run.optimizer,
    }


def at_save(metadata: Mapping[str, str], stem: str, steps: int, epochs_finished: int, now: float) -> Metadata:
    """Return a run's metadata with what changes from save to save.

    Args:
        metadata: as `network_metadata` gives it.
        stem: the file's name without extension; it stands in for an `--output_name` that was not given, because user
            interfaces offer `ss_output_name` as the name to type in prompts.
        steps: updates made so far, over all resumed runs.
        epochs_finished: whole epochs behind, see `RunLength.epochs_finished`.
        now: Unix time in seconds.
    """
    refreshed = dict(metadata)
    if refreshed.get("ss_output_name") == "None":
        refreshed["ss_output_name"] = stem
    return refreshed | {"ss_steps": str(steps), "ss_epoch": str(epochs_finished), "ss_training_finished_at": str(now)}


def minimal(metadata: Mapping[str, str]) -> Metadata:
    """Keep what `--no_metadata` keeps: what other programs need, and a comment, which is there because somebody wrote it."""
    has_comment = metadata.get(_COMMENT, "None") != "None"
    return {key: value for key, value in metadata.items() if key in MINIMAL_KEYS or (has_comment and key == _COMMENT)}


def network_record(tensors: Mapping[str, Any], options: NetworkOptions) -> NetworkRecord:
    """Read rank and alpha from a network's own tensors, and the rest from the options.

    Only linear layers and 1×1 convolutions count: the rank of 3×3 convolutions is an argument of its own. Networks of another
    kind than down- and up-projections are described by the options.

    Args:
        tensors: the network's state dict, names `<module>.lora_down.weight` and `<module>.alpha`.
        options: what was asked for.
    """
    dims: set[int] = set()
    alphas: set[float] = set()
    for name, tensor in tensors.items():
        module, _, rest = name.partition(".")
        if rest == "lora_down.weight" and tuple(tensor.shape[2:]) != (3, 3):
            dims.add(int(tensor.shape[0]))
            alphas.add(float(tensors.get(f"{module}.alpha", tensor.shape[0])))
    rates = options.text_encoder_rates()
    return NetworkRecord(
        dim=_single(dims, options.network_dim),
        alpha=_single(alphas, options.network_alpha),
        args=None if options.network_args is None else _network_args(options.network_args, options.network_dropout),
        text_encoder_lr=str(rates[0] if rates[0] == rates[1] else list(rates)),
    )


def _single(found: Collection[float], given: float | None) -> str:
    """Return the one value found, "Dynamic" for several, and the option as it was given where there is none."""
    if not found:
        return str(given)
    return str(next(iter(found))) if len(found) == 1 else "Dynamic"


def _network_args(pairs: Sequence[str], dropout: float | None) -> dict[str, str | float | None]:
    """Split `key=value` arguments; readers of this key expect the network's dropout among them."""
    args: dict[str, str | float | None] = {"dropout": dropout}
    for pair in pairs:
        key, _, value = pair.partition("=")
        args[key] = value
    return args


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def source_names(model_path: str, vae_path: str | None) -> Metadata:
    """Return the base names of the files trained on, without the folders a person keeps them in."""
    names = {"ss_sd_model_name": Path(model_path).name}
    return names if vae_path is None else names | {"ss_vae_name": Path(vae_path).name}


def base_weights_keys(options: NetworkOptions) -> Metadata:
    """Return what was merged into the base model before training, names without folders; no keys where nothing was."""
    if not options.base_weights:
        return {}
    names, given = [Path(path).name for path in options.base_weights], options.base_weights_multiplier or ()
    strengths = [*given, *[1.0] * (len(names) - len(given))]
    return {"ss_base_weights": json.dumps(names), "ss_base_weights_multiplier": json.dumps(strengths)}


def hash_sources(model_path: str, vae_path: str | None) -> "Future[Metadata]":
    """Start hashing the base model and VAE in the background; reading gigabytes need not delay the first step.

    Returns:
        A future of `ss_sd_model_hash`, `ss_new_sd_model_hash` and the same of the VAE; keys of a path that does not exist (a hub
        name) are absent, and a folder's hashes say so.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")
    future = executor.submit(_hashes, model_path, vae_path)
    executor.shutdown(wait=False)
    return future


def _hashes(model_path: str, vae_path: str | None) -> Metadata:
    found = {}
    for name, path in (("sd_model", model_path), ("vae", vae_path)):
        if path is not None and Path(path).exists():
            found[f"ss_{name}_hash"] = model_hash(path)
            files = [Path(path)] if Path(path).is_file() else []
            found[f"ss_new_{name}_hash"] = remembered_hash("sha256", files, partial(sha256_file, path))
    return found
