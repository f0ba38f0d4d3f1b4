"""The loader of a training run."""

from library.dataset.loader import Loader
from library.training.setting import Setting


def make_loader(setting: Setting, *, persistent: bool) -> Loader:
    """Make a loader of this process's share of every batch.

    Args:
        setting: of the run.
        persistent: keep the worker processes between epochs.
    """
    options, accelerator = setting.options.dataset, setting.accelerator
    return Loader(
        setting.dataset,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=options.max_data_loader_n_workers,
        persistent=persistent,
        pin=accelerator.device.type == "cuda",
        accumulation=setting.options.length.gradient_accumulation_steps,
        total_updates=setting.length.total_updates,
    )
