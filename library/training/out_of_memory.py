"""What is said when memory is full: what was in it, and which options not given yet would make the run fit."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.memory.packed import PackedTensor
from library.memory.sizes import gib
from library.options.checks_distributed import what_divides
from library.options.checks_optimizer import fused_problems, host_state_problems, optimizer_name
from library.options.errors import UserError
from library.options.scripts import (
    CacheLatentsOptions,
    CacheTextEncoderOutputsOptions,
    SdxlTrainNetworkOptions,
    SdxlTrainOptions,
    TrainingOptions,
)
from library.training.saving import Saver
from library.training.step import ModelParts


@dataclass
class Resident:
    """What a run has built so far; filled while it begins."""

    parts: ModelParts | None = None
    saver: Saver | None = None
    batch_size: int = 1
    """The largest of all datasets."""


@dataclass(frozen=True)
class Sizes:
    """What lies on the device, in bytes."""

    trained: int = 0
    denoiser: int = 0
    """Its frozen weights."""
    text_encoders: int = 0
    """Their frozen weights."""
    vae: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    """The moving average of the trained weights."""
    peak: int = 0
    """The most that tensors held; 0 where the allocator does not tell."""
    batch_size: int = 1

    @classmethod
    def of(cls, resident: Resident, device: torch.device) -> "Sizes":
        """Count what lies on a device; parameters that are divided over processes count with the share of this one."""
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        parts, saver = resident.parts, resident.saver
        if parts is None or saver is None:
            return cls(peak=peak)
        trained = [each for each in saver.live.module.parameters() if each.requires_grad]
        encoders = [each for each in parts.text_encoders if each is not None]
        state = [value for values in saver.live.optimizer.state.values() for value in values.values()]
        extras = [tensor for extra in saver.live.extras.values() for tensor in extra.state_dict().values()]
        return cls(
            trained=_bytes(trained, device),
            denoiser=_frozen(parts.denoiser, device),
            text_encoders=sum(_frozen(encoder, device) for encoder in encoders),
            vae=0 if parts.vae is None else _frozen(parts.vae, device),
            gradients=_bytes((each.grad for each in trained), device),
            optimizer=_bytes(state, device),
            average=_bytes(extras, device),
            peak=peak,
            batch_size=resident.batch_size,
        )

    @property
    def rest(self) -> int:
        """Activations and all other temporary results, at the peak."""
        weights = self.trained + self.denoiser + self.text_encoders + self.vae
        return max(self.peak - weights - self.gradients - self.optimizer - self.average, 0)

    def lines(self) -> list[str]:
        """Return one line for each part that is there."""
        named = {
            "trained weights": self.trained,
            "frozen weights of the U-Net": self.denoiser,
            "frozen weights of the text encoders": self.text_encoders,
            "weights of the VAE": self.vae,
            "gradients": self.gradients,
            "optimizer state": self.optimizer,
            "moving average of the weights": self.average,
            "activations and the rest, at the peak": self.rest,
        }
        return [f"  {name}: {_shown(size)}" for name, size in named.items() if size]


@contextmanager
def telling_of_memory(options: TrainingOptions) -> Iterator[Resident]:
    """Turn full memory inside the block into a sentence; what the run has built is put into what is given.

    Raises:
        UserError: memory was full.
    """
    resident = Resident()
    try:
        yield resident
    except (MemoryError, RuntimeError) as error:
        if not is_full(error):
            raise
        device = next((each.device for each in _parameters(resident)), torch.device("cpu"))
        raise UserError(sentence(error, options, Sizes.of(resident, device), has_begun=resident.saver is not None)) from error


def is_full(error: BaseException) -> bool:
    """Tell whether an error means that memory is full; PyTorch has no class of its own for main memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def sentence(error: BaseException, options: TrainingOptions, sizes: Sizes, *, has_begun: bool) -> str:
    """Say what was in memory and what may help.

    Args:
        error: as it was raised; its first line is shown.
        options: of the run.
        sizes: see `Sizes`.
        has_begun: whether the model was loaded and ready to train.
    """
    where = "while it trained" if has_begun else "before training, while models were loaded or pictures and captions encoded"
    held = sizes.lines()
    helping = remedies(options, sizes) if has_begun else _remedies_before(options)
    kept = "States and models that were saved are as they were."
    return _told(error, where, kept, ["In memory were:", *held] if held else [], helping)


@contextmanager
def telling_of_memory_while_caching(options: CacheLatentsOptions | CacheTextEncoderOutputsOptions) -> Iterator[None]:
    """Turn full memory inside the block, which fills caches, into a sentence.

    Raises:
        UserError: memory was full.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_full(error):
            raise
        if isinstance(options, CacheLatentsOptions):
            where, helping = "while pictures were encoded", _remedies_before(options)
        else:
            where, helping = "while captions were encoded", _remedies_for_texts(options)
        raise UserError(
            _told(error, where, "What was cached before is kept; the same command goes on there.", [], helping)
        ) from error


def _told(error: BaseException, where: str, kept: str, held: Sequence[str], helping: Iterable[str]) -> str:
    cause = (str(error) or type(error).__name__).splitlines()[0]
    advice = ["What makes room, the cheapest first:", *(f"  - {each}" for each in helping)]
    return "\n".join([f"Memory is full: it happened {where}. {kept}", f"  {cause}", *held, *advice])


def remedies(options: TrainingOptions, sizes: Sizes) -> Iterator[str]:
    """Yield options that are not given and what they save, those first that cost least."""
    precision, optimizer = options.precision, options.optimizer
    is_finetuning = isinstance(options, SdxlTrainOptions)
    if options.ema.ema_device == "device":
        yield f"--ema_device cpu: the moving average of the weights{_saves(sizes.average)}"
    if not options.cache.cache_latents:
        yield f"--cache_latents: the VAE{_saves(sizes.vae)} and its activations"
    if isinstance(options, SdxlTrainOptions | SdxlTrainNetworkOptions) and not options.cache.cache_text_encoder_outputs:
        yield f"--cache_text_encoder_outputs, where the text encoders are not trained: they leave{_saves(sizes.text_encoders)}"
    if not precision.gradient_checkpointing:
        yield "--gradient_checkpointing: most of the activations, for a third more time"
    elif precision.checkpoint_fraction < 1:
        yield "leaving out --checkpoint_fraction: activations of the blocks that are not computed again"
    if precision.mixed_precision == "no":
        yield "--mixed_precision bf16: half of the activations and of frozen weights"
    if optimizer_name(optimizer).lower() in ("adamw", "adam"):
        yield f"--optimizer_type AdamW8bit: three quarters of the optimizer's state{_saves(sizes.optimizer * 3 // 4)}"
    if optimizer.optimizer_states != "host" and _can_keep_states_on_host(options):
        yield f"--optimizer_states host: all of the optimizer's state, for transfers in each update{_saves(sizes.optimizer)}"
    if is_finetuning and not optimizer.fused_backward_pass and _can_step_in_backward(options):
        yield f"--fused_backward_pass: nearly all gradients{_saves(sizes.trained)}"
    if sizes.batch_size > 1:
        yield (
            f"a smaller batch size than {sizes.batch_size}, with --gradient_accumulation_steps for the difference: activations in "
            "proportion"
        )
    if not is_finetuning and precision.denoiser_quant is None:
        yield f"--base_quant int8: about half of frozen bfloat16 weights{_saves(sizes.denoiser // 2)}"
        yield f"--base_quant nf4: nearly three quarters of them, for larger errors{_saves(sizes.denoiser * 47 // 64)}"
    if is_finetuning and not precision.full_bf16:
        yield f"--full_bf16 with --mixed_precision bf16: half of weights and gradients{_saves(sizes.trained)}"
    if not precision.swaps_blocks and (not is_finetuning or optimizer.fused_backward_pass):
        yield "--blocks_to_swap 40, or more: so many blocks of the U-Net wait in main memory, for slower steps"
    if not precision.cpu_offload_checkpointing:
        yield "--cpu_offload_checkpointing: what checkpoints keep, for slower steps"
    yield "a lower --resolution: activations in proportion to the area"


def _can_keep_states_on_host(options: TrainingOptions) -> bool:
    asked = options.optimizer.model_copy(update={"optimizer_states": "host"})
    divided = what_divides(options.distributed) is not None
    return not any(host_state_problems(asked, options.precision.mixed_precision, is_divided=divided))


def _can_step_in_backward(options: TrainingOptions) -> bool:
    asked = options.optimizer.model_copy(update={"fused_backward_pass": True})
    return not any(fused_problems(asked, options.length.gradient_accumulation_steps, options.precision.mixed_precision))


def _remedies_before(options: TrainingOptions | CacheLatentsOptions) -> Iterator[str]:
    if options.cache.vae_batch_size > 1:
        yield f"--vae_batch_size 1 instead of {options.cache.vae_batch_size}"
    if not options.precision.vae_tiling:
        yield "--vae_tiling: pictures with a side above 1024 are encoded in tiles, with slightly other latents"
    if options.precision.no_half_vae:
        yield "leaving out --no_half_vae, where bfloat16 is at hand: half of what the VAE needs"
    if options.precision.mixed_precision == "no":
        yield "--mixed_precision bf16: half of the weights that are not trained"
    yield "a lower --resolution, and ending other programs that use this memory"


def _remedies_for_texts(options: CacheTextEncoderOutputsOptions) -> Iterator[str]:
    if options.dataset.train_batch_size > 1:
        yield f"--train_batch_size 1 instead of {options.dataset.train_batch_size}"
    if options.precision.mixed_precision == "no":
        yield "--mixed_precision bf16: half of the weights of the text encoders"
    yield "ending other programs that use this memory"


def _parameters(resident: Resident) -> Iterator[nn.Parameter]:
    return iter(()) if resident.parts is None else resident.parts.denoiser.parameters()


def _frozen(module: nn.Module, device: torch.device) -> int:
    own = [each for each in module.parameters() if not each.requires_grad]
    return _bytes([*own, *module.buffers()], device)


def _bytes(values: Iterable[object], device: torch.device) -> int:
    tensors = [part for value in values if isinstance(value, Tensor) for part in _stored(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device.type == device.type)


def _stored(tensor: Tensor) -> Sequence[Tensor]:
    """Return what stands in memory for a tensor that may be divided over processes, or packed."""
    return tensor.parts if isinstance(tensor, PackedTensor) else [getattr(tensor, "_local_tensor", tensor)]


def _saves(size: int) -> str:
    return f" ({_shown(size)})" if size else ""


def _shown(size: int) -> str:
    return gib(size) if size >= 2**27 else f"{size / 2**20:.1f} MiB"
