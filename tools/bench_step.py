"""One training step with random weights and random data, and how fast it is. It runs the functions of the training loop itself."""

import gc
import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import networks.lora
from library.dataset.batch import Batch
from library.diffusion.objective import DdpmObjective
from library.diffusion.schedule import NoiseSchedule
from library.memory.codecs import CODECS
from library.memory.host_activations import HOST
from library.memory.packed import pack_layers
from library.models.family import ModelSource, SizeConditioning
from library.models.sdxl.checkpoint import Checkpoint
from library.models.sdxl.family import SdxlFamily
from library.models.sdxl.sizes import SdxlSizes, TextEncoderSizes, VaeSizes, plan_unet
from library.models.sdxl.unet import UNet
from library.optim.optimizers import make_optimizer
from library.optim.schedules import make_schedule
from library.optim.updates import make_updater
from library.options.groups.bench import BenchOptions
from library.options.groups.compile import CompileOptions
from library.options.groups.distributed import ProcessGroupOptions
from library.options.groups.loss import LossOptions
from library.options.groups.noise import NoiseOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from library.options.groups.scheduler import SchedulerOptions
from library.training.accelerator import DTypes, make_accelerator
from library.training.compiling import compiled_blocks
from library.training.denoiser import arrange_denoiser, prepare_denoiser
from library.training.host_waits import watched
from library.training.loop import TrainingRun, one_step
from library.training.step import ModelParts, TrainStep
from library.training.trainable import ModelTrainable, NetworkTrainable, Trainable

SIZES = {
    "tiny": SdxlSizes(
        unet=plan_unet(64, (1, 1, 2), (0, 1, 2), context_dim=192, vector_dim=176),
        te1=TextEncoderSizes.by_convention(64, 3, "quick_gelu"),
        te2=TextEncoderSizes.by_convention(128, 3, "gelu", projection_dim=128),
        vae=VaeSizes((32, 64, 128, 128), 2, 4),
    ),
    "full": SdxlSizes(),
}
"""The U-Nets that can be measured; `tiny` is what tools/make_tiny_sdxl.py writes."""

TEXT_TOKENS = 77
MOST_KERNELS = 20
"""Of which the names are kept."""
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
"""Side of the square matrices whose product gives the device's peak: large enough to be bound by arithmetic alone."""


@dataclass(frozen=True)
class Kernels:
    """What ran on a GPU."""

    number: int
    """Of kernels, copies and fillings."""
    busy_seconds: float
    """That they took together; two that ran at once count twice."""
    longest: dict[str, float]
    """Seconds by name, those first that took most in all."""

    @classmethod
    def of(cls, found: Iterable[tuple[str, float]]) -> "Kernels":
        """Sum up the kernels of a step, given the name and the microseconds of each."""
        seconds: Counter[str] = Counter()
        number = 0
        for name, microseconds in found:
            seconds[name] += microseconds / 1e6  # type: ignore[assignment]  # a Counter's values may be any numbers
            number += 1
        return cls(number, sum(seconds.values()), dict(seconds.most_common(MOST_KERNELS)))


@dataclass(frozen=True)
class Speed:
    """What was measured."""

    seconds_per_step: float
    """Mean over the timed steps."""
    step_seconds: dict[str, float]
    """`median`, `fastest` and `slowest` of the timed steps; far apart, they say that the device was doing something else too."""
    images_per_second: float
    tera_flop_per_step: float
    """Counted: matrix products, convolutions and attention of forward and backward, recomputation included."""
    tera_flop_per_second: float
    matmul_peak_tera_flop_per_second: float
    """Measured here, with one large matrix product in the number type of the computation."""
    share_of_matmul_peak: float
    peak_memory_gib: dict[str, float]
    """On a GPU `allocated` and `reserved` from the first step on; else `resident`, of the process."""
    trained_parameters: int
    host_waits: dict[str, int]
    """In as many steps after the timed ones: how often the host waited for the device, by place in the code."""
    kernels: Kernels | None = None
    """Of one step on a GPU."""
    compiled_blocks: int = 0
    """Of the U-Net, that ran compiled."""


def measure(
    bench: BenchOptions, precision: StepPrecisionOptions, optimizer: OptimizerOptions, compile: CompileOptions | None = None
) -> Speed:
    """Build the step, run it, and measure.

    Raises:
        UserError: the device cannot compute in this precision, or a package is missing.
    """
    run, batch = make_run(bench, precision, optimizer)
    device, parts = run.accelerator.device, cast(TrainStep, run.accelerator.unwrap_model(run.step)).parts
    counted = count_tera_flop(run, batch)  # before blocks are compiled, in which nobody could count
    blocks = None
    if compile is not None and compile.torch_compile:
        blocks = compiled_blocks(parts.family, run.trainable, parts.denoiser, compile.dynamo_backend)
    reset_peak_memory(device)
    for _ in range(bench.warmup):
        one_step(run, batch)
    each = timed_each(device, lambda: one_step(run, batch), bench.steps)
    seconds = statistics.mean(each)
    memory = peak_memory_gib(device)
    with watched(run) as waits:
        for _ in range(bench.steps):
            one_step(run, batch)
    kernels = kernels_of_step(device, lambda: one_step(run, batch))
    dtype = DTypes.of(precision, no_half_vae=False, save_precision=None).compute
    del run.step
    peak = matmul_peak(device, dtype)
    return Speed(
        seconds_per_step=seconds,
        step_seconds={"median": statistics.median(each), "fastest": min(each), "slowest": max(each)},
        images_per_second=bench.batch_size / seconds,
        tera_flop_per_step=counted,
        tera_flop_per_second=counted / seconds,
        matmul_peak_tera_flop_per_second=peak,
        share_of_matmul_peak=counted / seconds / peak,
        peak_memory_gib=memory,
        trained_parameters=sum(parameter.numel() for parameter in run.trainable.module.parameters() if parameter.requires_grad),
        host_waits=dict(waits),
        kernels=kernels,
        compiled_blocks=0 if blocks is None else blocks.num_compiled,
    )


# --- what is measured ---------------------------------------------------------------------------------------------------


def make_run(
    bench: BenchOptions,
    precision: StepPrecisionOptions,
    optimizer: OptimizerOptions,
    accelerator: Any = None,
    host: torch.device = HOST,
) -> tuple[TrainingRun, Batch]:
    """Build what the training loop needs for one step: random weights made on the device, and a batch of random data.

    Args:
        bench: what is trained.
        precision: number types and checkpointing.
        optimizer: its options.
        accelerator: None for that of this machine.
        host: what stands for main memory.
    """
    accelerator = accelerator or make_accelerator(precision, ProcessGroupOptions())
    device, dtypes = accelerator.device, DTypes.of(precision, no_half_vae=False, save_precision=None)
    sizes = SIZES[bench.size]
    unet = make_unet(sizes, device, dtypes.compute if bench.mode == "lora" else dtypes.trained, precision)
    family = SdxlFamily(ModelSource("random weights"), Checkpoint("random weights", {}), sizes)
    prepare_denoiser(family, unet, precision, device)
    trainable = TRAINABLES[bench.mode](family, unet, bench, device, dtypes.trained)
    arrange_denoiser(family, unet, trainable.module, precision, device, host)
    parameters = [parameter for parameter in trainable.module.parameters() if parameter.requires_grad]
    objective = DdpmObjective(NoiseSchedule.make(device=device), False, NoiseOptions(), LossOptions())
    step = TrainStep(trainable.module, ModelParts(family, unet, [None, None], None), objective, train_text=False)
    made = make_optimizer(optimizer, [{"params": parameters}])
    prepared_step, prepared_optimizer = accelerator.prepare(step, made)
    run = TrainingRun(
        accelerator=accelerator,
        step=prepared_step,
        trainable=trainable,
        updater=make_updater(made, prepared_optimizer, parameters, optimizer, accelerator),
        schedule=make_schedule(SchedulerOptions(), optimizer, made, bench.warmup + bench.steps),
        batches=lambda epoch, first: [],
        batches_per_epoch=1,
        accumulation=1,
        max_updates=bench.warmup + bench.steps,
        seed=0,
        observe_loss=lambda loss: None,
    )
    trainable.on_epoch_start()
    return run, make_batch(bench, sizes, device)


def make_unet(sizes: SdxlSizes, device: torch.device, dtype: torch.dtype, precision: StepPrecisionOptions) -> UNet:
    """Make a frozen U-Net with random weights where and as it is used, never in another place or number type first."""
    with default_dtype(dtype), device:
        unet = UNet(sizes.unet)
    unet.requires_grad_(False)
    if precision.denoiser_quant is not None:
        pack_layers(unet, CODECS[precision.denoiser_quant])
    return unet


def _finetune(family: SdxlFamily, unet: nn.Module, bench: BenchOptions, device: torch.device, dtype: torch.dtype) -> Trainable:
    unet.requires_grad_(True)
    return ModelTrainable(family, {"unet": unet}, "safetensors", v_prediction=False, zero_terminal_snr=False)


def _lora(family: SdxlFamily, unet: nn.Module, bench: BenchOptions, device: torch.device, dtype: torch.dtype) -> Trainable:
    with default_dtype(dtype), device:
        network = networks.lora.create_network(1.0, bench.network_dim, 1.0, None, [], unet)
    network.apply_to([], unet, apply_text_encoder=False, apply_unet=True)
    network.requires_grad_(True)
    return NetworkTrainable(network, unet, [], max_norm=None)


TRAINABLES: dict[str, Callable[[SdxlFamily, nn.Module, BenchOptions, torch.device, torch.dtype], Trainable]] = {
    "lora": _lora,
    "finetune": _finetune,
}
"""What each mode trains."""


def make_batch(bench: BenchOptions, sizes: SdxlSizes, device: torch.device) -> Batch:
    """Make a batch as the data loader would with cached latents and cached text: random, on the CPU, pinned for a GPU."""
    count, side = bench.batch_size, bench.resolution // SdxlFamily.latent_stride
    square = torch.tensor([[bench.resolution, bench.resolution]] * count)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    batch = Batch(
        images=None,
        latents=random(SdxlFamily.latent_channels, side, side),
        captions=["random"] * count,
        text_cond={
            "hidden1": random(TEXT_TOKENS, sizes.te1.width),
            "hidden2": random(TEXT_TOKENS, sizes.te2.width),
            "pool2": random(sizes.te2.projection_dim),
        },
        sizes=SizeConditioning(square, torch.zeros_like(square), square),
        loss_weights=torch.ones(count),
        draw_seeds=list(range(count)),
        image_keys=["random"] * count,
    )
    return batch.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else batch


# --- measuring --------------------------------------------------------------------------------------------------------


def timed(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Return the mean seconds of `work`, waiting for the device only before the first and after the last."""
    wait_for(device)
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    wait_for(device)
    return (time.perf_counter() - began) / repeats


def timed_each(device: torch.device, work: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of each call of `work`; their sum is the time of all. The device is not waited for between calls."""
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        wait_for(device)
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        wait_for(device)
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(marks)]
    times = [time.perf_counter()]
    for _ in range(repeats):
        work()
        times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


def count_tera_flop(run: TrainingRun, batch: Batch) -> float:
    """Count the floating-point operations of one step, in units of 10¹²; a multiplication and its addition are two."""
    with FlopCounterMode(display=False) as counter:
        one_step(run, batch)
    return cast(int, counter.get_total_flops()) / 1e12


def kernels_of_step(device: torch.device, step: Callable[[], object]) -> Kernels | None:
    """Return what a step runs on a GPU, as PyTorch's profiler sees it; None without a GPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        wait_for(device)
    on_device = (each for each in profiler.events() or () if each.device_type.name == "CUDA")
    return Kernels.of((each.name, each.time_range.elapsed_us()) for each in on_device)


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Measure the best rate of a large square matrix product, in 10¹² operations per second.

    Args:
        device: where.
        dtype: of the matrices.
        seconds: about how long to measure.
    """
    side = MATMUL_SIDE.get(device.type, 2048)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> Tensor:
        return torch.mm(left, right, out=out)

    timed(device, multiply, 2)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, timed(device, multiply, 5))
    return 2 * side**3 / best / 1e12


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak of building the model."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: torch.device) -> dict[str, float]:
    """Return the peak since `reset_peak_memory` on a GPU; without one, that of the process since it started, in GiB."""
    if device.type == "cuda":
        peaks = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    else:
        peaks = {"resident": peak_resident_bytes()}
    return {name: size / 2**30 for name, size in peaks.items()}


def peak_resident_bytes() -> int:
    """The largest memory this process has had in RAM."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make floating-point tensors in `dtype` unless another one is asked for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
