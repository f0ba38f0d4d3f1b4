"""What a dataset says about the loss: masks, what is preserved, how strongly a network acts. Free of torch, to be checked first."""

from collections.abc import Iterator

from library.options.dataset_config import DatasetConfig, SubsetConfig
from library.options.dataset_keys import PRESERVE
from library.options.errors import UsageError
from library.options.groups.loss import LossOptions
from library.options.nearest import did_you_mean


def check_data_terms(data: DatasetConfig, options: LossOptions, *, trains_network: bool) -> None:
    """Check what a dataset says about the loss against what is trained.

    Args:
        data: the dataset definition.
        options: the loss options.
        trains_network: whether a network is trained, and not the model itself.

    Raises:
        UsageError: with all mistakes at once.
    """
    problems = _network_problems(data) if trains_network else _model_problems(data)
    if options.masked_loss_normalize and not any(_with_masks(data, options)):
        problems.append(
            "--masked_loss_normalize has no masks to divide by. Give --masked_loss and a conditioning_data_dir, or alpha_mask; or "
            "leave it out."
        )
    if problems:
        raise UsageError(problems)


def _network_problems(data: DatasetConfig) -> list[str]:
    return [
        f"network_multiplier of the dataset with {section.subsets[0].source} is 0, so nothing would be learned from it. "
        "Give another number, or remove the dataset."
        for section in data.sections
        if section.network_multiplier == 0 and section.subsets
    ]


def _model_problems(data: DatasetConfig) -> list[str]:
    strengths = [
        f"network_multiplier of the dataset with {section.subsets[0].source} is {section.network_multiplier:g}, but this script "
        "trains no network. Remove it, or train with sdxl_train_network.py."
        for section in data.sections
        if section.network_multiplier != 1 and section.subsets
    ]
    return strengths + [
        f"{PRESERVE} of {subset.source} holds images to what the model predicts without the network, but this script trains none. "
        "Remove it, or train with sdxl_train_network.py."
        for subset in _subsets(data)
        if subset.custom_attributes.get(PRESERVE)
    ]


def needs_strength(data: DatasetConfig) -> bool:
    """Say whether the network has to act more or less strongly for some images."""
    preserves = any(subset.custom_attributes.get(PRESERVE) for subset in _subsets(data))
    return preserves or any(section.network_multiplier != 1 for section in data.sections)


def describe_data_terms(data: DatasetConfig, options: LossOptions) -> list[str]:
    """Say what the dataset adds to the loss, one line each, for the head of a run."""
    with_control, with_alpha = _with_masks(data, options)
    normalized = ", divided by the mask's area" if options.masked_loss_normalize else ""
    lines = []
    if with_control:
        lines.append(f"masked by control images ({_folders(with_control)}){normalized}")
    if with_alpha:
        lines.append(f"masked by alpha channels ({_folders(with_alpha)}){normalized}")
    preserved = [subset for subset in _subsets(data) if subset.custom_attributes.get(PRESERVE)]
    if preserved:
        lines.append(f"held to the model without the network: {_folders(preserved)}")
    strengths = sorted({section.network_multiplier for section in data.sections} - {1.0})
    return lines + [f"network strength {strength:g} for one dataset or more" for strength in strengths]


def unread_attributes(data: DatasetConfig) -> str | None:
    """Say which custom attributes nothing here reads, which may be a typing error; None where there are none."""
    names = sorted({name for subset in _subsets(data) for name in subset.custom_attributes} - {PRESERVE})
    if not names:
        return None
    meant = next(filter(None, (did_you_mean(name, [PRESERVE]) for name in names)), "")
    return f"Nothing here reads the custom_attributes {', '.join(names)}; they are handed on with the images.{meant}"


def _with_masks(data: DatasetConfig, options: LossOptions) -> tuple[list[SubsetConfig], list[SubsetConfig]]:
    """Return the subsets masked by control images and those masked by alpha channels."""
    control = [subset for subset in _subsets(data) if options.masked_loss and subset.conditioning_data_dir]
    return control, [subset for subset in _subsets(data) if subset.alpha_mask and subset not in control]


def _subsets(data: DatasetConfig) -> Iterator[SubsetConfig]:
    return (subset for section in data.sections for subset in section.subsets)


def _folders(subsets: list[SubsetConfig]) -> str:
    return ", ".join(dict.fromkeys(subset.source for subset in subsets))
