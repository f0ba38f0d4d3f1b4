"""`--dataset_class`: a dataset class of the person's own makes the batches, in place of all that the dataset options describe."""

from collections.abc import Iterator

from library.options.dataset_records import DatasetConfig, SectionConfig
from library.options.declare import OptionGroup
from library.options.effects import without_effect
from library.options.groups.dataset import DatasetOptions
from library.options.scripts import TrainingOptions

_SOURCES = ("dataset_config", "train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir", "cache_info")
_ONLY_OURS = {
    "cache_latents": "latents may come with the batches, as `latents`",
    "cache_latents_to_disk": "latents may come with the batches, as `latents`",
    "cache_text_encoder_outputs": "text outputs may come with the batches, as `text_encoder_outputs_list`",
    "cache_text_encoder_outputs_to_disk": "text outputs may come with the batches, as `text_encoder_outputs_list`",
    "validation_split": "no images can be held out of batches that are made elsewhere",
    "dataset_report": "there are no image files to report on",
    "debug_dataset": "the batches have no files to show",
}
_READ = {"dataset_class", "max_data_loader_n_workers", "persistent_data_loader_workers", "resolution", "weighted_captions"}
"""Options of the groups below that keep their meaning."""


def class_problems(options: TrainingOptions) -> Iterator[str]:
    """Yield what cannot be used together with `--dataset_class`."""
    name = options.dataset.dataset_class
    if name is None:
        return
    if "." not in name.strip("."):
        yield f"--dataset_class {name} must be a dotted path such as package.module.Class."
    if sources := [f"--{source}" for source in _SOURCES if getattr(options.dataset, source)]:
        which, them = " and ".join(sources), "it" if len(sources) == 1 else "them"
        yield f"--dataset_class makes the batches itself, so {which} would name images nobody reads. Leave {them} out."
    groups = (options.dataset, options.cache, options.validation, options.preflight)
    for option in (option for option in _ONLY_OURS if any(getattr(group, option, None) for group in groups)):
        yield f"--{option} cannot be used with --dataset_class: {_ONLY_OURS[option]}. Leave it out."


def class_notes(options: TrainingOptions) -> Iterator[str]:
    """Yield which options have no effect because batches are made by a class."""
    if options.dataset.dataset_class is None:
        return
    told = {*_SOURCES, *_ONLY_OURS, *_READ}
    idle = [name for group in (options.dataset, options.caption, options.image) for name in _changed(group) if name not in told]
    if idle:
        names = without_effect([f"--{name}" for name in idle])
        yield f"The batches are made by {options.dataset.dataset_class}, so {names}."


def class_definition(dataset: DatasetOptions) -> DatasetConfig:
    """Return what is known of a dataset whose batches are made by a class: its size, and nothing else."""
    section = SectionConfig(
        resolution=dataset.size or (1024, 1024),
        batch_size=1,
        enable_bucket=False,
        min_bucket_reso=256,
        max_bucket_reso=1024,
        bucket_reso_steps=64,
        bucket_no_upscale=False,
        network_multiplier=1.0,
        resize_interpolation=None,
        subsets=(),
    )
    return DatasetConfig((section,), prior_loss_weight=1.0, from_file=True)


def _changed(group: OptionGroup) -> list[str]:
    return [name for name, value in group if value != type(group).model_fields[name].default]
