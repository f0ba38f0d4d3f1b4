"""The images of a run, their uses in an epoch, and the draws each use makes."""

import logging
import os
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from library.dataset.augmentation import ColorChange, draw_color_change, draw_placement
from library.dataset.buckets import Placement
from library.dataset.cached import LatentFiles, LatentsInMemory, TextFiles, TextsInMemory
from library.dataset.caption_variants import CaptionVariants
from library.dataset.captions import caption_for_use, settled_caption
from library.dataset.columns import Ints
from library.dataset.findings import Findings, Kind
from library.dataset.index import Section, build_index
from library.dataset.items import Item, Items, JoinedItems
from library.dataset.plan import EpochPlan, draw_seed, plan_epoch, posterior_seed
from library.options.dataset_config import CaptionRules, DatasetConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Draws:
    """What chance decides for one use of an image."""

    seed: int
    """For the noise, the timestep and the posterior sample."""
    flipped: bool
    placement: Placement
    """How the image gets to its training size this time."""
    color: ColorChange | None
    """None leaves the colours as they are."""
    caption: str


class Dataset:
    """All images of a run.

    Args:
        config: checked by `load_dataset_config`.
        seed: of the run; the same in all processes.
        findings: receives what is wrong or odd. Without it, errors are raised and warnings logged here.

    Raises:
        UserError: images or caption files cannot be used, and there are no `findings` to take them; all of them are named.
    """

    brings_latents = False
    """Whether latents come with the batches from elsewhere, so that no VAE is needed."""
    brings_texts = False
    """Whether text outputs do, so that no text encoders are needed."""

    def __init__(self, config: DatasetConfig, seed: int, findings: Findings | None = None) -> None:
        for warning in config.warnings:
            if findings is None:
                logger.warning("%s", warning)
            else:
                findings.warning(Kind.CONFIG, "", warning)
        self.config = config
        self.seed = seed
        self.sections: tuple[Section, ...] = build_index(config, findings, seed=seed)
        self.items: Sequence[Item] = JoinedItems([section.items for section in self.sections])
        """Images that are trained on."""
        self.held_out: Sequence[Item] = JoinedItems([section.held_out for section in self.sections])
        """Images the loss is measured on; never trained on."""
        self.latents: LatentFiles | LatentsInMemory | None = None
        """Set by `cache_latents`."""
        self.texts: TextFiles | TextsInMemory | None = None
        """Set by `cache_text_outputs`."""
        self.text_variants: int | None = None
        """Set by `cache_text_outputs`: the variants each caption was expanded into; None where captions are made for each use."""

    @property
    def num_images(self) -> int:
        """The number of images that are trained on; an image in two datasets counts twice."""
        return len(self.items)

    @property
    def num_train_uses(self) -> int:
        """The number of training images, repeats included, regularisation images left out."""
        return sum(section.num_train_uses for section in self.sections)

    @property
    def encoded_items(self) -> Sequence[Item]:
        """All images that caches hold: those trained on, then those held out, by number."""
        return JoinedItems([self.items, self.held_out])

    @property
    def num_uses(self) -> int:
        """The number of images seen in an epoch, repeats included."""
        return len(self.use_items)

    @cached_property
    def use_items(self) -> Sequence[int]:
        """The item of each registered use: items in their order, each as often as it repeats."""
        repeats = np.concatenate([section.items.repeats for section in self.sections])
        return array("i", np.repeat(np.arange(len(repeats), dtype=np.int32), repeats).tobytes())

    @cached_property
    def buckets(self) -> Mapping[tuple[int, tuple[int, int]], Ints]:
        """Uses by (section, bucket), sorted."""
        return uses_by_bucket([section.items for section in self.sections], start=0)

    def batches_per_epoch(self, num_processes: int) -> int:
        """Return how many batches every process gets in an epoch."""
        sizes = self._global_batch_sizes(num_processes)
        return sum(-(-len(uses) // size) for uses, size in zip(self.buckets.values(), sizes, strict=True))

    def plan(self, epoch: int, num_processes: int) -> EpochPlan:
        """Return the batches of an epoch (counted from 1) over all processes."""
        return plan_epoch(list(self.buckets.values()), self._global_batch_sizes(num_processes), self.seed, epoch)

    def held_out_batches(self) -> Sequence[tuple[int, ...]]:
        """Return the batches of held-out images, always the same ones, as uses that follow the registered ones."""
        if not self.held_out:
            return ()
        groups = uses_by_bucket([section.held_out for section in self.sections], start=self.num_uses)
        sizes = [self.sections[section].config.batch_size for section, _ in groups]
        return plan_epoch(list(groups.values()), sizes, self.seed, epoch=0).batches

    def item_of(self, use: int) -> Item:
        """Return the image of a use; uses from `num_uses` on are those of held-out images."""
        return self.items[self.use_items[use]] if use < self.num_uses else self.held_out[use - self.num_uses]

    def names_of(self, uses: Sequence[int]) -> list[str]:
        """Return the files of uses, for messages."""
        return [self.item_of(use).path for use in uses]

    def draws(self, use: int, epoch: int, *, update: int = 0, total_updates: int = 0) -> Draws:
        """Return what chance decides for a use in an epoch, whoever loads it and with whatever batch size.

        Nothing is left to chance in a use of a held-out image.

        Args:
            use: registered use of an image.
            epoch: counted from 1.
            update: optimizer updates before the one the image is for; captions may grow with it.
            total_updates: of the whole run.
        """
        item = self.item_of(use)
        if self.is_held_out(item):
            seed = posterior_seed(self.seed, item.path, flipped=False)
            return Draws(seed, False, item.geometry.placement, None, settled_caption(item.caption, self.caption_rules(item)))
        section = self.sections[item.section]
        subset = section.subset(item)
        seed = draw_seed(self.seed, epoch, use)
        rng = random.Random(seed)
        # in this order, each only where the subset asks for it: what is switched on leaves the draws before it as they were
        flipped = subset.flip_aug and rng.random() < 0.5
        placement = draw_placement(rng, item.path, item.size, item.geometry, subset, bucketed=section.config.enable_bucket)
        color = draw_color_change(rng) if subset.color_aug else None
        caption = self._caption(item, epoch, rng, update, total_updates)
        return Draws(seed, flipped, placement, color, caption)

    def is_held_out(self, item: Item) -> bool:
        """Say whether an item is one the loss is measured on."""
        return item.number >= len(self.items)

    def is_mirrored(self, item: Item) -> bool:
        """Say whether an item may be mirrored: also one that is held out, since another choice may train on it."""
        return self.sections[item.section].subset(item).flip_aug

    def is_masked(self, item: Item) -> bool:
        """Say whether an item's transparency masks its loss."""
        return self.sections[item.section].subset(item).alpha_mask

    def interpolation(self, item: Item) -> str | None:
        """Return the resampling method of an item; None chooses by direction."""
        return self.sections[item.section].interpolation(item)

    def caption_rules(self, item: Item) -> CaptionRules:
        """Return the caption settings of an item."""
        return self.sections[item.section].subset(item).captions

    def cached_texts(self, item: Item) -> tuple[str, ...]:
        """Return every text an item can have where texts are cached, but the empty one of dropped captions.

        Where images are held out, these are the texts of both parts: another choice, as of another seed, finds them in the cache.
        """
        texts = self._variants(item, self.text_variants or 1).texts()
        if not self.sections[item.section].subset(item).validation_split:
            return texts
        return tuple(dict.fromkeys([*texts, settled_caption(item.caption, self.caption_rules(item))]))

    def _caption(self, item: Item, epoch: int, rng: random.Random, update: int, total_updates: int) -> str:
        rules, count = self.caption_rules(item), self.text_variants
        if count is None:
            return caption_for_use(item.caption, rules, epoch, rng, update=update, total_updates=total_updates)
        return self._variants(item, count).for_use(epoch, rng, update=update, total_updates=total_updates)

    def _variants(self, item: Item, count: int) -> CaptionVariants:
        name = os.path.basename(item.cache_stem)  # stays when the folder is moved
        return CaptionVariants(item.caption, self.caption_rules(item), name, count)

    def _global_batch_sizes(self, num_processes: int) -> list[int]:
        return [self.sections[section].config.batch_size * num_processes for section, _ in self.buckets]


def uses_by_bucket(parts: Sequence[Items], start: int) -> dict[tuple[int, tuple[int, int]], Ints]:
    """Group uses, numbered from `start` on, by section and bucket, in this order."""
    groups: dict[tuple[int, tuple[int, int]], Ints] = {}
    for number, items in enumerate(parts):
        buckets, bucket_of = np.unique(items.buckets, axis=0, return_inverse=True)
        by_use = np.repeat(bucket_of.reshape(-1), items.repeats)
        uses = np.argsort(by_use, kind="stable").astype(np.int32) + np.int32(start)
        ends = np.cumsum(np.bincount(by_use, minlength=len(buckets)))
        for bucket, own in zip(buckets.tolist(), np.split(uses, ends[:-1]), strict=True) if len(buckets) else ():
            groups[number, (bucket[0], bucket[1])] = own
        start += len(by_use)
    return groups
