"""Options about torch.compile."""

from typing import ClassVar, Literal

from library.options.declare import OptionGroup, flag, option

GONE_BACKENDS = frozenset({"aot_ts_nvfuser", "fx2trt", "nvprims_nvfuser", "ofi", "tensort"})
"""Names that command lines may have and PyTorch 2 dropped, or never had."""


class CompileOptions(OptionGroup):
    """Compilation of the model."""

    topic: ClassVar[str] = "torch.compile"

    torch_compile: bool = flag(
        "Compile the blocks of the U-Net before the first step, once for each shape: slow to start, faster steps."
    )
    dynamo_backend: Literal[
        "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs",
        "ofi", "fx2trt", "onnxrt", "tensort", "ipex", "tvm",
    ] = option("inductor", "Compiler behind --torch_compile.")  # fmt: skip
