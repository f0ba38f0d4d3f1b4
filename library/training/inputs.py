"""The files that training options name, read and checked before anything heavy is imported."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from library.generation.request import ImageRequest
from library.generation.sample_prompts import SampleDefaults, read_sample_prompts
from library.options.checks_optimizer import check_optimizer_options
from library.options.dataset_class import class_definition
from library.options.dataset_config import DatasetConfig, load_dataset_config
from library.options.errors import problems_of
from library.options.groups.cache import LatentCacheOptions
from library.options.scripts import CacheLatentsOptions, CacheTextEncoderOutputsOptions, TrainingOptions
from library.training.data_terms import check_data_terms
from library.training.outputs import file_problems, folder_problems, output_problems
from library.training.preview_plan import PreviewPlan
from library.training.trackers import tracker_arguments

Options = TypeVar("Options", bound=TrainingOptions)


def input_problems(options: Options, *further: Callable[[Options], Any], trains_network: bool) -> list[str]:
    """Say what is wrong with the optimizer, the output folder and the files that the options name, one sentence each.

    Args:
        options: of the script.
        further: functions of the script that read more and raise `UsageError` or `UserError`.
        trains_network: whether a network is trained, and not the model itself.
    """

    def check_data(options: Options) -> None:
        if options.dataset.dataset_class is None:  # else the batches themselves say what they are
            check_data_terms(dataset_definition(options), options.loss, trains_network=trains_network)

    problems = output_problems(options.output) + check_optimizer_options(options.optimizer, options.scheduler)
    if options.preflight.dataset_report is not None:
        problems += folder_problems("--dataset_report", options.preflight.dataset_report)
    if options.logging.log_events is not None:
        problems += file_problems("--log_events", options.logging.log_events)
    if options.logging.logging_dir:
        problems += folder_problems("--logging_dir", Path(options.logging.logging_dir))
    readers: tuple[Callable[[Options], Any], ...] = (check_data, sample_requests, _check_tracker_file, *further)
    for read in readers:
        problems += problems_of(partial(read, options))
    return problems


def _check_tracker_file(options: TrainingOptions) -> None:
    tracker_arguments(options.logging.log_tracker_config)


def dataset_definition(
    options: TrainingOptions | CacheLatentsOptions | CacheTextEncoderOutputsOptions, cache: LatentCacheOptions | None = None
) -> DatasetConfig:
    """Read and check `--dataset_config`, or the folders given in its place; of `--dataset_class` little is known before it runs.

    Args:
        options: of a training script or a caching tool.
        cache: what is cached, where that is not as the options say.

    Raises:
        UsageError: with all mistakes at once.
    """
    if options.dataset.dataset_class is not None:
        return class_definition(options.dataset)
    return load_dataset_config(
        options.dataset,
        options.caption,
        options.image,
        options.cache if cache is None else cache,
        validation=options.validation,
        masked_loss=options.loss.masked_loss,
        follows_images=options.follows_images if isinstance(options, TrainingOptions) else None,
    )


def sample_requests(options: TrainingOptions, size: tuple[int, int] = (1024, 1024)) -> list[ImageRequest]:
    """Read the sample prompts where sample images are wanted; pictures have `size` (width, height) unless they say otherwise."""
    if PreviewPlan.of(options.sample).is_empty or options.sample.sample_prompts is None:
        return []
    defaults = SampleDefaults(width=size[0], height=size[1], sampler=options.sample.sample_sampler, guided=options.follows_images)
    return read_sample_prompts(options.sample.sample_prompts, defaults)
