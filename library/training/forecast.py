"""The most memory that a run will need: what it does on its device, traced with fake tensors.

Everything is built by the functions that build the run, of tensors that have shapes and types but no data: the model's sizes come
from the headers of its files, those of a batch from the plan of the data.
"""

import copy
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from library.dataset.batch import Batch
from library.dataset.cached import TextsInMemory
from library.dataset.items import Item
from library.generation.request import ImageRequest
from library.memory.pretend import PretendAccelerator, fake_tensors
from library.memory.trace import ACTIVATIONS, OPTIMIZER, Peak, StorageCounter, make_state, register_resident, trace_peak, with_more
from library.models.caption_encoding import encode_captions
from library.models.family import Family, TextCond
from library.options.errors import UserError
from library.training.building import Recipe, build_step
from library.training.compiling import batch_of_each_shape, load
from library.training.denoiser import arrange_denoiser, load_denoiser
from library.training.ema import MovingAverage
from library.training.loop import one_step
from library.training.phases import (
    DEVICE,
    LATENTS,
    PHASES,
    SAMPLES,
    SAVING,
    STEP,
    TEXTS,
    drawing_samples,
    encoding_captions,
    encoding_images,
)
from library.training.position import Position
from library.training.preparation import TextSide, caches_latents, encodes_images, keeps_text_encoders
from library.training.setting import PartDTypes, Setting, Trained
from library.training.stand_ins import computed_state, step_each_kind_once, trained_parameters, use_kernels_of, what_is_traced
from library.training.step import ModelParts

_HOST = torch.device("meta")
"""Stands for main memory, which is not counted."""


@dataclass(frozen=True)
class Forecast:
    """What a run will need on its device."""

    phases: Mapping[str, Peak]
    """The peak of each phase of the run, in their order."""
    batch: tuple[int, ...] = ()
    """Images of the largest batch, and their width and height."""

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def peak(self) -> Peak:
        """What tensors hold at most."""
        return self.phases[self.largest]

    @property
    def most_while_training(self) -> str:
        """The phase that needs most once training has begun."""
        return max(self.phases.keys() - {TEXTS, LATENTS}, key=lambda name: self.phases[name].total)

    @property
    def while_training(self) -> int:
        """Bytes that tensors hold at most once training has begun."""
        return self.phases[self.most_while_training].total

    @property
    def needed(self) -> int:
        """Bytes that a device should have: beside tensors, the driver's context and libraries, and what lies between tensors."""
        return needed_for(self.peak.total)


BESIDE_TENSORS = 600 * 2**20
"""Bytes of a CUDA context with the kernels and workspaces of its libraries: 0.3 to 0.6 GiB, by card and driver."""
BETWEEN_TENSORS = 1.03
"""What PyTorch's allocator holds for each byte of tensors at the peak."""


def needed_for(size: int) -> int:
    """Return the bytes that a device should have for bytes of tensors; see `Forecast.needed`."""
    return int(size * BETWEEN_TENSORS) + BESIDE_TENSORS


class Tracing:
    """A run on a GPU, made of fake tensors.

    Args:
        recipe: of the script.
        setting: of the run.
        requests: sample prompts; empty where no sample images are drawn.
    """

    def __init__(self, recipe: Recipe, setting: Setting, requests: Sequence[ImageRequest]) -> None:
        self._recipe = recipe
        self._asked = setting
        self._requests = requests
        self.trained: Trained | None = None
        """What is trained, once it was built."""
        self.defaults: Mapping[str, Any] = {}
        """Of the optimizer, once it was built."""

    def forecast(self, wanted: Collection[str] = PHASES) -> Forecast:
        """Trace phases, all of them unless told otherwise; the training step always is.

        Raises:
            UserError: of the data nothing is known before training.
        """
        with fake_tensors() as mode:
            setting = pretended(self._asked)
            uses = largest_batch(setting)
            dtypes = self._recipe.dtypes_of_parts(setting)
            width, height = setting.dataset.item_of(uses[0]).geometry.bucket
            phases: dict[str, Peak] = {}
            if not keeps_text_encoders(setting):
                phases[TEXTS], cond = encoding_captions(setting, dtypes.text_encoders)
                setting.dataset.texts = TextsInMemory(_SameForAll({name: value[0] for name, value in cond.items()}))
            if caches_latents(setting) and LATENTS in wanted:
                phases[LATENTS] = encoding_images(setting)
            if not encodes_images(setting):
                setting.dataset.latents = _AnyLatents(setting.family)  # type: ignore[assignment]  # stands for latents in memory
            with unset_fake_temporarily():  # the loader draws numbers
                loaded = next(load(setting, [uses]))
            batch = loaded.mapped(lambda tensor: _faked(mode, tensor))
            phases |= self._training(setting, dtypes, batch, wanted)
        return Forecast({name: phases[name] for name in wanted if name in phases}, (len(uses), width, height))

    def _training(self, setting: Setting, dtypes: PartDTypes, batch: Batch, wanted: Collection[str]) -> dict[str, Peak]:
        """Build the run, and trace one update and what happens between updates."""
        text, vae = _text_side(setting, dtypes), _vae(setting)
        denoiser = load_denoiser(setting, dtypes)
        trained = self.trained = self._recipe.make_trainable(setting, denoiser, text, vae)
        arrange_denoiser(setting.family, denoiser, trained.trainable.module, setting.options.precision, DEVICE, _HOST)
        parts = ModelParts(setting.family, denoiser, text.encoders, vae, setting.options.cache.vae_batch_size)
        run, _, optimizer = build_step(setting, trained, parts)
        self.defaults = optimizer.defaults
        use_kernels_of(optimizer, "cuda")
        average = _average(setting, trained)
        run.trainable.on_epoch_start()
        parameters = trained_parameters(optimizer)
        make_state(optimizer, run.updater.finish)
        if run.accumulation > 1:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)

        def update() -> None:
            one_step(run, batch)
            if average is not None:
                average.after_update(Position(update=1))

        modules = [trained.trainable.module, denoiser, *(each for each in text.encoders if each is not None)]
        modules += [] if vae is None else [vae]
        kept = [] if average is None else list(average.state_dict().values())
        counter = StorageCounter(DEVICE)
        step_each_kind_once(run.updater, counter)
        phases = {STEP: trace_peak(update, modules, optimizer, DEVICE, kept, counter)}

        def resident() -> StorageCounter:
            counter = StorageCounter(DEVICE)
            register_resident(counter, modules, optimizer, kept)
            return counter

        if self._requests and SAMPLES in wanted:
            with trained.trainable.evaluation(), torch.no_grad():
                cond = batch.text_cond or encode_captions(setting.family, batch.captions[:1], text.encoders, DEVICE)
                phases[SAMPLES] = drawing_samples(setting, denoiser, vae, cond, self._requests, resident())
        phases[SAVING] = with_more(resident().peak, ACTIVATIONS, max(parameter.nbytes for parameter in parameters))
        state = computed_state(self._asked.options.optimizer, parameters)
        return {name: with_more(peak, OPTIMIZER, state) for name, peak in phases.items()}


def pretended(setting: Setting) -> Setting:
    """Return a setting of which everything can be built without data: in fake tensors, on a device that is not there."""
    options = replace(setting.options, optimizer=what_is_traced(setting.options.optimizer))
    family = setting.family.without_values()
    with quiet():
        objective = family.make_objective(options.model, options.noise, options.loss, DEVICE)
    accelerator: Any = PretendAccelerator(DEVICE, setting.autocast_dtype, setting.accelerator.num_processes)
    dataset = copy.copy(setting.dataset)
    if options.cache.text is not None:
        dataset.text_variants = options.cache.text.text_cache_variants
    return replace(setting, options=options, accelerator=accelerator, family=family, objective=objective, dataset=dataset)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what is built once more from telling once more of itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def largest_batch(setting: Setting) -> tuple[int, ...]:
    """Return the uses of images of the batch with the most pixels.

    Raises:
        UserError: the batches come from a class of the person's own.
    """
    shapes = batch_of_each_shape(setting)
    if not shapes:
        raise UserError(
            f"The memory of this run cannot be forecast: the size of its batches is known to "
            f"{setting.options.dataset.dataset_class} alone. Leave out --dataset_class, or the forecast."
        )

    def pixels(uses: tuple[int, ...]) -> int:
        width, height = setting.dataset.item_of(uses[0]).geometry.bucket
        return len(uses) * width * height

    return max(shapes, key=pixels)


class _SameForAll(Mapping[str, TextCond]):
    """The same text outputs for every caption."""

    def __init__(self, cond: TextCond) -> None:
        self._cond = cond

    def __getitem__(self, caption: str) -> TextCond:
        return self._cond

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class _AnyLatents:
    """Latents of every image, without values."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def read(self, item: Item, *, flipped: bool, seed: int = 0) -> Tensor:
        """Return an item's latents (C, h, w)."""
        width, height = (side // self._family.latent_stride for side in item.geometry.bucket)
        return torch.empty(self._family.latent_channels, height, width)

    def read_mask(self, item: Item) -> Tensor:
        """Return an item's mask (H, W)."""
        width, height = item.geometry.bucket
        return torch.empty(height, width)


def _faked(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    return tensor if mode.is_our_fake(tensor) else mode.from_tensor(tensor)


def _text_side(setting: Setting, dtypes: PartDTypes) -> TextSide:
    family = setting.family
    if not keeps_text_encoders(setting):
        return TextSide([None] * len(family.encoder_names), None)
    return TextSide([*family.load_text_encoders(dtypes.text_encoders, DEVICE, dtypes.hold_text_encoders)], None)


def _vae(setting: Setting) -> nn.Module | None:
    """Return the VAE where it stays on the device."""
    return setting.family.load_vae(setting.dtypes.vae, DEVICE) if encodes_images(setting) else None


def _average(setting: Setting, trained: Trained) -> MovingAverage | None:
    options = setting.options.ema
    if options.ema_decay is None or options.ema_device == "cpu":
        return None
    return MovingAverage(trained.trainable.module, options.ema_decay, in_main_memory=False)
