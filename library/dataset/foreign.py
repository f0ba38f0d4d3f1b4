"""A dataset class of the person's own, whose batches come ready: checked, and handed on as ours.

Its batches are dictionaries with the keys of sd-scripts' batches. What is left to us is the order in which they are trained on, and
the seeds of all that is drawn, so that runs repeat and resume exactly if its `__getitem__` draws from the usual generators alone.
"""

import importlib
import inspect
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from library.dataset.batch import Batch
from library.dataset.dataset import Dataset
from library.dataset.foreign_batch import read_batch
from library.dataset.index import Section
from library.dataset.items import Choice, Items
from library.dataset.plan import EpochPlan, Share, draw_seed, plan_epoch
from library.models.family import Family
from library.options.dataset_config import DatasetConfig
from library.options.errors import UserError


class ForeignDataset(Dataset):
    """The batches that a class of the person's own makes; each is one use of the dataset, and there are no items.

    Args:
        name: dotted path of the class.
        config: as `class_definition` gives it.
        seed: of the run; the same in all processes.
        family: of the model the batches are for.
        arguments: the class is made of: tokenizer, longest caption, size, whether only to look.
        has_network: whether a network is trained, which a batch may set the strength of.
        follows_images: whether that network learns to follow the batches' control images.

    Raises:
        UserError: there is no such class, it is no dataset with numbered batches, or its first batch cannot be trained on.
    """

    def __init__(
        self,
        name: str,
        config: DatasetConfig,
        seed: int,
        family: Family,
        arguments: Sequence[Any],
        *,
        has_network: bool,
        follows_images: bool = False,
    ) -> None:
        # nothing of the base class's index: there are no files
        self.name = name
        self.seed = seed
        self.family = family
        self.has_network = has_network
        self.follows_images = follows_images
        self.own = made(name, imported(name), arguments)
        self.items = ()
        self.held_out = ()
        self.latents = self.texts = self.text_variants = None
        self.tell("set_seed", seed)
        first = load_foreign_batch(self, 1, Share((0,), 1.0))
        self.brings_latents = first.latents is not None
        self.brings_texts = first.text_cond is not None
        (section,) = config.sections
        self.config = replace(config, sections=(replace(section, batch_size=first.size),))
        none = Items(section, 0, 0, (), Choice.joined([]))
        self.sections = (Section(self.config.sections[0], none, none, ()),)

    @property
    def num_train_uses(self) -> int:
        """What the class says; else as if all batches were as large as the first."""
        said = getattr(self.own, "num_train_images", None)
        return said if isinstance(said, int) and said else self.num_uses * self.config.sections[0].batch_size

    @cached_property
    def num_uses(self) -> int:  # read once: a length may be slow
        """The number of batches of the class."""
        return len(self.own)

    def batches_per_epoch(self, num_processes: int) -> int:
        """Return how many batches every process gets in an epoch."""
        return -(-self.num_uses // num_processes)

    def plan(self, epoch: int, num_processes: int) -> EpochPlan:
        """Return the order of an epoch: every batch of the class once, one for each process at a time."""
        return plan_epoch([range(self.num_uses)], [num_processes], self.seed, epoch)

    def names_of(self, uses: Sequence[int]) -> list[str]:
        """Return what to call batches in messages."""
        return [f"batch {use} of {self.name}" for use in uses]

    def tell(self, method: str, value: int) -> None:
        """Call a method that the datasets of sd-scripts have, where the class has it."""
        function = getattr(self.own, method, None)
        if callable(function):
            function(value)


def load_foreign_batch(dataset: ForeignDataset, epoch: int, share: Share, *, update: int = 0, total_updates: int = 0) -> Batch:
    """Let the class make one batch, and check it; see `load_batch`.

    Raises:
        UserError: the batch cannot be trained on; it and the key are named.
    """
    (number,) = share.uses
    seed = draw_seed(dataset.seed, epoch, number)
    with drawing_from(seed):
        dataset.tell("set_current_epoch", epoch)
        dataset.tell("set_current_step", update)
        dataset.tell("set_max_train_steps", total_updates)
        given = dataset.own[number]
    (place,) = dataset.names_of([number])
    batch = read_batch(given, place, dataset.family, has_network=dataset.has_network, follows_images=dataset.follows_images)
    for key, is_lacking in (
        ("latents", dataset.brings_latents and batch.latents is None),
        ("text_encoder_outputs_list", dataset.brings_texts and batch.text_cond is None),
    ):
        if is_lacking:
            raise UserError(
                f"--dataset_class: {key} of {place} is missing, but the first batch has it, so the model that makes it is not "
                "loaded. Let every batch have it, or none."
            )
    return replace(
        batch,
        loss_weights=batch.loss_weights * share.weight,
        draw_seeds=[draw_seed(seed, epoch, row) for row in range(batch.size)],
        image_keys=batch.image_keys or [place] * batch.size,
    )


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Seed the generators that everybody uses, of Python, NumPy and torch, and put them back afterwards."""
    python, numpy_state = random.getstate(), np.random.get_state()  # it is the one that others use
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


def imported(name: str) -> Any:
    """Import a class by its dotted path.

    Raises:
        UserError: there is no such module, it cannot be imported, or has no such class.
    """
    module_name, _, class_name = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise UserError(
            f"--dataset_class {name}: the module {module_name} cannot be imported: {error}. It is looked for in the folder of the "
            "script, among the installed packages, and in the folders of the environment variable PYTHONPATH."
        ) from error
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        classes = [each for each, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__]
        has = f"it has {', '.join(classes)}" if classes else "it has none of its own"
        raise UserError(f"--dataset_class {name}: {module_name} has no class {class_name}; {has}.")
    return found


def made(name: str, own_class: Any, arguments: Sequence[Any]) -> Any:
    """Make a dataset of a class.

    Raises:
        UserError: it takes other arguments, or its batches cannot be counted and picked by number.
    """
    try:
        inspect.signature(own_class).bind(*arguments)
    except TypeError as error:
        raise UserError(
            f"--dataset_class {name} is made with four arguments, tokenizer (None), max_token_length, resolution and "
            f"debug_dataset, but: {error}."
        ) from None
    dataset = own_class(*arguments)
    lacks = [method for method in ("__len__", "__getitem__") if not hasattr(dataset, method)]
    if lacks:
        raise UserError(
            f"--dataset_class {name} has no {' and no '.join(lacks)}. Batches are counted and picked by number, so that each "
            "is trained on once an epoch; an iterable dataset cannot be used."
        )
    if not len(dataset):
        raise UserError(f"--dataset_class {name} has no batches: its length is 0.")
    return dataset
