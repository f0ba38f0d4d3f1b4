"""Options only `tools/bench.py` has."""

from typing import ClassVar, Literal

from library.options.declare import OptionGroup, flag, option


class BenchOptions(OptionGroup):
    """What is measured."""

    topic: ClassVar[str] = "Benchmark"

    mode: Literal["lora", "finetune"] = option("lora", "Train a LoRA on a frozen U-Net, or the whole U-Net.")
    size: Literal["tiny", "full"] = option("full", "The real SDXL U-Net, or a small one of the same layout for a CPU.")
    resolution: int = option(1024, "Side of the square images in pixels, a multiple of 32.", ge=32)
    batch_size: int = option(1, "Images per step.", ge=1)
    network_dim: int = option(32, "Rank of the LoRA.", ge=1)
    steps: int = option(10, "Steps that are timed.", ge=1)
    warmup: int = option(3, "Steps before them that are not timed.", ge=0)
    trace: bool = flag("Only forecast the peak memory, with fake tensors: no GPU and little memory needed.")
    count_operations: bool = flag("Only count the operations of a step, with fake tensors: each is at least one kernel to launch.")
    json_file: str | None = option(None, "File for the result as JSON; may be written --json.")
