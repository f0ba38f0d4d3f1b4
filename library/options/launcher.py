"""What accelerate's configuration says of DeepSpeed, as the options of the same meaning.

`accelerate launch` hands it on in environment variables. What was typed, or stands in the script's configuration file, wins.
"""

from collections.abc import Iterator, Mapping

_OPTIONS = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload_optimizer_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": "offload_optimizer_nvme_path",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_param_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "offload_param_nvme_path",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "zero3_save_16bit_model",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "max_grad_norm",
}
"""By variable: the option, which is the key of accelerate's configuration too but where it is in `_OTHER_KEYS`."""
_OTHER_KEYS = {"max_grad_norm": "gradient_clipping"}
_SAYS_NOTHING = ("", "none", "auto", "false")
_REFUSED = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": (
        "deepspeed_config_file",
        "A file of DeepSpeed's own says more than can be kept here. Write zero_stage, offload_optimizer_device and "
        "offload_param_device under deepspeed_config in its place.",
    ),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": ("deepspeed_moe_layer_cls_names", "SDXL has no mixture of experts. Leave it out."),
}


def starts_deepspeed(environment: Mapping[str, str]) -> bool:
    """Tell whether `accelerate launch` was told to use DeepSpeed."""
    return environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1")


def deepspeed_settings(environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return what accelerate's configuration says of DeepSpeed, as one would type it.

    Returns:
        By option, its text and the place it stands at; empty where DeepSpeed is not asked for.
    """
    if not starts_deepspeed(environment):
        return {}
    settings = {"deepspeed": ("", place("distributed_type: DEEPSPEED"))}
    for variable, option in _OPTIONS.items():
        text = environment.get(variable, "")
        if text.lower() not in _SAYS_NOTHING:
            settings[option] = (text, place(_OTHER_KEYS.get(option, option)))
    return settings


def launcher_problems(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield what of accelerate's configuration for DeepSpeed is not followed here."""
    if starts_deepspeed(environment):
        for variable, (key, instead) in _REFUSED.items():
            if environment.get(variable, "").lower() not in _SAYS_NOTHING:
                yield f"{place(key)} is not followed. {instead}"


def place(key: str) -> str:
    """Return how a key of accelerate's configuration is told of."""
    return f"{key} in accelerate's configuration"
