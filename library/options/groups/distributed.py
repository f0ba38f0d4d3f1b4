"""Options about several processes."""

from typing import ClassVar, Literal

from library.options.declare import OptionGroup, PathText, flag, option


class ProcessGroupOptions(OptionGroup):
    """Several processes on one or more machines."""

    topic: ClassVar[str] = "Several processes and DeepSpeed"

    ddp_timeout: int | None = option(None, "Minutes until processes that wait for each other give up.", ge=1)
    ddp_gradient_as_bucket_view: bool = flag("Passed to DistributedDataParallel as gradient_as_bucket_view.")
    ddp_static_graph: bool = flag("Passed to DistributedDataParallel as static_graph.")


class DistributedOptions(ProcessGroupOptions):
    """Several processes, and DeepSpeed."""

    deepspeed: bool = flag("Train with DeepSpeed.")
    zero_stage: Literal[0, 1, 2, 3] = option(2, "ZeRO stage of DeepSpeed.")
    offload_optimizer_device: Literal["cpu", "nvme"] | None = option(None, "Where DeepSpeed keeps optimizer states.")
    offload_optimizer_nvme_path: PathText = option(None, "NVMe folder for optimizer states.")
    offload_param_device: Literal["cpu", "nvme"] | None = option(None, "Where DeepSpeed keeps parameters.")
    offload_param_nvme_path: PathText = option(None, "NVMe folder for parameters.")
    zero3_init_flag: bool = flag("Make models under ZeRO-3 initialisation.")
    zero3_save_16bit_model: bool = flag("Gather 16-bit weights for saving under ZeRO-3.")
    fp16_master_weights_and_gradients: bool = flag("Keep master weights and gradients in float16 under DeepSpeed.")
